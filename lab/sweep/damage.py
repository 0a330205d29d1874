"""What is wrong with the values of a ``plan.json`` that was edited, or that another user made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from blockwright.lab.sweep import hosts

TEXT, TEXTS, WHOLE, FIGURES = "a text", "a list of texts", "a whole number", "figures by name"
DIRECTION = "minimize or maximize"
OR_NULL = " or null"
PLAN = {
    **dict.fromkeys(("kind", "command", "metric", "cwd"), TEXT),
    "direction": DIRECTION,
    **dict.fromkeys(("argv", "flags", "also"), TEXTS),
    "name": "a name",
    "workers": WHOLE,
    "n_trials": WHOLE + OR_NULL,
    "study": "a mapping",
}
JOB = {
    "job": WHOLE,
    "overrides": TEXTS,
    "arm": TEXT,
    "seed": WHOLE + OR_NULL,
    "lr": "a learning rate" + OR_NULL,
    "after": WHOLE + OR_NULL,
}
ARM = {
    "name": TEXT,
    "overrides": TEXTS,
    "figures": FIGURES + OR_NULL,
    "match": "a mapping" + OR_NULL,
    "against": TEXT + OR_NULL,
}
MATCH = {"budget": TEXT, "by": TEXT, "tol": "a number", "changed": "a mapping", "residual": FIGURES}
LARGEST = 2**53  # up to which a float is exact, and names of folders are short


def damage_of(plan: Mapping[str, Any]) -> str:
    """The first wrong value, as a clause; empty if there is none."""
    if wrong := _wrong(plan, {**PLAN, **dict.fromkeys(hosts.installed(), "a mapping")}):
        return wrong
    for key, needed, kinds in (("jobs", "job", JOB), ("arms", "name", ARM)):
        entries = plan.get(key, [])
        if not isinstance(entries, list):
            return f"{key} is not a list"
        for entry in entries:
            if not isinstance(entry, dict) or not {needed, "overrides"} <= entry.keys():
                return f"one of its {key} lacks {needed} or overrides"
            if wrong := _wrong(entry, kinds) or _wrong(entry.get("match") or {}, MATCH):
                return f"of one of its {key}, {wrong}"
    jobs = [job["job"] for job in plan.get("jobs", [])]
    if plan.get("arms") and not jobs:
        return "it has arms, but no jobs"
    return "two of its jobs have one number" if len(set(jobs)) < len(jobs) else ""


def _wrong(node: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    for key, kind in kinds.items():
        if key in node and not _is(node[key], kind):
            return f"{key} is {str(node[key])[:40]!r}, not {kind}"
    return ""


def _is(value: Any, kind: str) -> bool:
    if value is None:
        return kind.endswith(OR_NULL)
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    number = whole or (isinstance(value, float) and math.isfinite(value))
    return {
        TEXT: isinstance(value, str),
        DIRECTION: value in ("minimize", "maximize"),
        "a name": isinstance(value, str) or number,
        WHOLE: whole,
        "a number": number,
        "a learning rate": number and value >= 0,
        "a mapping": isinstance(value, dict),
        TEXTS: isinstance(value, list) and all(isinstance(each, str) for each in value),
        FIGURES: isinstance(value, dict) and all(v is None or _is(v, "a number") for v in value.values()),
    }[kind.removesuffix(OR_NULL)]
