"""The arms of a sweep: those of its plan, or groups of runs that differ only in the seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from blockwright.lab.report.sweep import Arm, Run
from blockwright.registry import ConfigError, did_you_mean


def planned(plan: Mapping[str, Any], runs: Sequence[Run]) -> list[Arm]:
    """The arms that a plan names, with their runs."""
    named = {int(job["job"]): job.get("arm") for job in plan.get("jobs") or []}
    return [
        Arm(
            str(arm["name"]),
            tuple(arm.get("overrides") or ()),
            tuple(run for run in runs if named.get(run.job) == arm["name"]),
            arm.get("figures") or {},
            arm.get("match"),
            arm.get("against"),
        )
        for arm in plan["arms"]
    ]


def grouped(runs: Sequence[Run]) -> list[Arm]:
    """Group runs that differ only in the seed into arms, in the order of their start."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        own = tuple(o for o in run.overrides if o.lstrip("+").partition("=")[0] != "seed")
        groups.setdefault(own, []).append(run)
    shared = set.intersection(*(set(own) for own in groups))
    different = [[o for o in own if o not in shared] for own in groups]
    names = _names(different)
    return [Arm(n, tuple(own), tuple(r)) for n, own, r in zip(names, different, groups.values(), strict=True)]


def _names(different: Sequence[Sequence[str]]) -> list[str]:
    """Short names of the arms: ``mla`` for model/attention=mla where nothing else differs, else d_ff=64 lr=0.1."""
    keys = {o.lstrip("+").partition("=")[0] for own in different for o in own}
    last = Counter(key.replace("/", ".").rpartition(".")[2] for key in keys)
    names = []
    for own in different:
        words = []
        for override in own:
            key, _, value = override.lstrip("+").partition("=")
            short = key.replace("/", ".").rpartition(".")[2]
            alone = len(keys) == 1 and "/" in key
            words.append(value if alone else f"{short if last[short] == 1 else key}={value}")
        names.append(" ".join(words) or "as configured")
    return names if len(set(names)) == len(names) else [" ".join(own) or "as configured" for own in different]


def baseline_of(plan: Mapping[str, Any], arms: Sequence[Arm], asked: str | None) -> int:
    """The place of the baseline among the arms.

    Args:
        plan: of the sweep, which may mark one
        arms: of the sweep
        asked: its name, on the command line

    Raises:
        ConfigError: no arm has this name
    """
    names = [arm.name for arm in arms]
    if asked is not None:
        if asked not in names:
            raise ConfigError("--baseline", asked, "no arm of the sweep has this name", did_you_mean(asked, names))
        return names.index(asked)
    marked = [str(arm["name"]) for arm in plan.get("arms") or [] if arm.get("baseline")]
    return names.index(marked[0]) if marked else 0
