"""What is wrong with the values of a ``plan.json`` that was edited, or that another user made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from blockwright.lab.sweep import hosts
from blockwright.registry.ranges import NonNegative, Number
from blockwright.registry.schema import conforms, fault

Whole = Annotated[int, Ge(-(2**53)), Le(2**53)]  # up to which a float is exact, and names of folders are short
Tried = Annotated[float, Gt(0), Le(1e30)]  # its octaves are drawn
Figures = dict[str, Number | None]
PLAN: dict[str, Any] = {
    **dict.fromkeys(("kind", "command", "metric", "cwd"), str),
    "direction": Literal["minimize", "maximize"],
    **dict.fromkeys(("argv", "flags", "launcher", "also"), list[str]),
    "name": str | Number,
    "workers": Whole,
    "n_trials": Whole | None,
    "study": dict,
    "tune": dict[str, Whole] | None,
    "tune_seeds": Whole,
    "tuned_by": dict[str, str] | None,
    "within": NonNegative | None,
    "looks": list[Whole] | None,
    "spend": str | None,
    "until": str | None,
    "bank": dict[str, NonNegative | str | list[Whole]] | None,
    "solved": dict[str, Number | str] | None,
    "seeds_planned": Whole | None,
    "seconds_a_job": NonNegative | None,
}
MATCH = {"budget": str, "by": str, "tol": Number, "target": Number | None, "changed": dict, "residual": Figures}
ENTRIES: dict[str, dict[str, Any]] = {
    "jobs": {
        "job": Whole,
        "overrides": list[str],
        "arm": str,
        "seed": Whole | None,
        "lr": Tried | None,
        "after": Whole | None,
        "from_step": Whole,
        "size": str,
        "duration": str,
        "parameters": NonNegative,
        "tokens": Whole,
        "stage": str,
        "tries": dict[str, Tried],
    },
    "arms": {
        "name": str,
        "overrides": list[str],
        "figures": Figures | None,
        "match": dict | None,
        "against": str | None,
    },
}


def damage_of(plan: Mapping[str, Any]) -> str:
    """The first wrong value, as a clause; empty if there is none."""
    if wrong := _wrong(plan, {**PLAN, **dict.fromkeys(hosts.installed(), dict)}):
        return wrong
    for key, needed in (("jobs", "job"), ("arms", "name")):
        entries = plan.get(key, [])
        if not isinstance(entries, list):
            return f"{key} is not a list"
        for entry in entries:
            if not isinstance(entry, dict) or not {needed, "overrides"} <= entry.keys():
                return f"one of its {key} lacks {needed} or overrides"
            if wrong := _wrong(entry, ENTRIES[key]) or _wrong(entry.get("match") or {}, MATCH):
                return f"of one of its {key}, {wrong}"
    jobs = [job["job"] for job in plan.get("jobs", [])]
    if plan.get("arms") and not jobs:
        return "it has arms, but no jobs"
    return "two of its jobs have one number" if len(set(jobs)) < len(jobs) else ""


def _wrong(node: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    for key, hint in hints.items():
        if key in node and not conforms(node[key], hint):
            return f"{key} is {str(node[key])[:40]!r} and {fault(node[key], hint)}"
    return ""
