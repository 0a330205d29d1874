"""``plan.json``: what a sweep's folder is to hold, written before the first job, so that it can be gone on with.

A grid or an ablation lists its jobs. A search does not know them beforehand: it says what it searches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from registry import ConfigError
from training.checkpoints.places import SWEEP
from training.jobs import write_json

PLAN = SWEEP
KINDS = ("ablation", "grid", "search")
NEEDED = ("kind", "metric", "direction")
RESUMED = "BLOCKWRIGHT_RESUMED_SWEEP"  # in the environment of a search that goes on: its folder


def write(directory: Path, plan: Mapping[str, Any]) -> None:
    """Write a plan, whole or not at all.

    Args:
        directory: of the sweep; made if it is not there
        plan: ``kind``, ``name``, ``command``, ``metric``, ``direction``, ``workers``, and ``jobs`` (``job``,
            ``overrides``, and in an ablation ``arm``, ``seed``, ``lr``) unless it is a search. ``flags``, optional,
            stand before the overrides of each job. ``cwd``, where relative paths of the overrides begin, is this
            process's unless given
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PLAN, {"cwd": os.getcwd(), **plan})


def read(directory: Path) -> dict[str, Any]:
    """The plan of a sweep.

    Raises:
        ConfigError: no sweep's folder, or its plan is damaged
    """
    file = directory / PLAN
    remedy = "Name the folder that a sweep has said: logs/TASK/multiruns/TIME or logs/ablation/NAME/TIME"
    if not directory.is_dir():
        raise ConfigError("DIR", str(directory), "there is no such folder", remedy)
    if not file.is_file():
        raise ConfigError("DIR", str(directory), f"holds no {PLAN}, so no sweep was begun here", remedy)
    try:
        plan = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(str(file), "…", f"is no JSON ({error})", "Start the sweep anew in another folder") from None
    missing = [key for key in NEEDED if key not in plan] if isinstance(plan, dict) else NEEDED
    if missing or plan["kind"] not in KINDS or (plan["kind"] != "search" and "jobs" not in plan):
        rule = f"is no plan of a sweep (needs {', '.join(NEEDED)}, and jobs unless it is a search)"
        raise ConfigError(str(file), "…", rule, "Start the sweep anew in another folder")
    if wrong := damage_of(plan):
        raise ConfigError(str(file), "…", f"is damaged: {wrong}", "Mend it, or start the sweep anew in another folder")
    return plan


def damage_of(plan: Mapping[str, Any]) -> str:
    """What is wrong with the values of a plan that somebody has edited; empty if nothing is."""
    for key, kind in (("metric", str), ("direction", str), ("workers", int), ("cwd", str), ("argv", list)):
        if key in plan and not isinstance(plan[key], kind):
            return f"{key} is {plan[key]!r}"
    for key, needed, kind in (("jobs", "job", int), ("arms", "name", str)):
        entries = plan.get(key) or []
        if not isinstance(entries, list):
            return f"{key} is no list"
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get(needed), kind):
                return f"one of its {key} lacks {needed}"
            overrides = entry.get("overrides")
            if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
                return f"one of its {key} lacks overrides"
            if not isinstance(entry.get("seed") or 0, int) or not isinstance(entry.get("lr") or 0, int | float):
                return f"one of its {key} has a seed or an lr that is no number"
    if len({job["job"] for job in plan.get("jobs") or []}) < len(plan.get("jobs") or []):
        return "two of its jobs have one number"
    return ""


def job_command(plan: Mapping[str, Any], job: Mapping[str, Any], more: Sequence[str] = ()) -> list[str]:
    """Arguments of ``train.py`` that run one job by itself, no sweep even where an experiment's file asks for one."""
    return [*plan.get("flags", []), *job["overrides"], "hydra.mode=RUN", *more]


def name_of(job: Mapping[str, Any]) -> str:
    """What an ablation calls a job of its plan: arm, seed and, where it is swept, learning rate. Empty in a grid."""
    if "arm" not in job:
        return ""
    rate = "" if job.get("lr") is None else f" lr={job['lr']:g}"
    return f"{job['arm']} seed={job.get('seed')}{rate}"


def is_resumed(sweep: Path) -> bool:
    """Whether this process is to go on with the search of a folder."""
    return os.environ.get(RESUMED) == str(sweep.resolve())
