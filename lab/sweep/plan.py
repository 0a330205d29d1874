"""``plan.json``: the plan of a sweep, written before the first job, so that it can be resumed.

A grid or an ablation lists its jobs. A search, which does not know them in advance, lists its parameters. A plan whose
kind has a design (seams.py) grows: further jobs follow from the results of those listed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from blockwright.lab.sweep import seams
from blockwright.registry import ConfigError, user_conf
from blockwright.registry.folder import read_json, read_yaml, write_json
from blockwright.registry.ranges import NonNegative, Number
from blockwright.registry.schema import conforms, fault
from blockwright.training.jobs import SWEEP

# --- what is wrong with the values of a ``plan.json`` that was edited, or that another user made ----------------------


Whole = Annotated[int, Ge(-(2**53)), Le(2**53)]  # up to which a float is exact, and names of folders are short
Tried = Annotated[float, Gt(0), Le(1e30)]  # its octaves are drawn
Figures = dict[str, Number | None]
KEYS: dict[str, Any] = {
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
    if wrong := _wrong(plan, {**KEYS, **dict.fromkeys(seams.hosts(), dict)}):
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


PLAN = SWEEP
KINDS = ("grid", "search")  # and those that have a design
NEEDED = ("kind", "metric", "direction")
RESUMED = "BLOCKWRIGHT_RESUMED_SWEEP"  # environment variable of a multirun that runs a plan: its folder


def write(directory: Path, plan: Mapping[str, Any]) -> None:
    """Write a plan atomically.

    Args:
        directory: of the sweep; created if needed
        plan: ``kind``, ``name``, ``command``, ``metric``, ``direction``, ``workers``, and ``jobs`` (``job``,
            ``overrides``, and in an ablation ``arm``, ``seed``, ``lr``, ``stage``, ``tries``, the tuned settings by
            path, and ``after``, the number of the job whose weights it starts from, or with ``from_step`` whose
            training it continues from that step) unless it is a search. ``flags`` precede the overrides of each job,
            by default those that name folders of the user. ``launcher``, optional, are the overrides that choose the
            launcher of Hydra which runs the jobs. ``cwd``, the base of relative paths in overrides, defaults to this
            process's
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PLAN, {"cwd": os.getcwd(), "flags": user_conf.flags(), **plan})


def begin(log_dir: str, kind: str, name: str, plan: Mapping[str, Any]) -> Path:
    """Write the plan of a new sweep into a folder of its own.

    Args:
        log_dir: ``paths.log_dir``
        kind, name: folders in it
        plan: as of ``write``

    Returns:
        the folder, ``log_dir/kind/name/TIME``

    Raises:
        ConfigError: it cannot be written
    """
    directory = Path(log_dir) / kind / name / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"
    try:
        write(directory, plan)
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise ConfigError("paths.log_dir", str(directory), rule, "Write paths.log_dir=FOLDER, one with room") from None
    return directory


def read(directory: Path) -> dict[str, Any]:
    """The plan of a sweep.

    Raises:
        ConfigError: not a sweep's folder, or a damaged plan
    """
    file = directory / PLAN
    remedy = "Name the folder printed by a sweep: logs/TASK/multiruns/TIME or logs/ablation/NAME/TIME"
    if not directory.is_dir():
        raise ConfigError("DIR", str(directory), "there is no such folder", remedy)
    if not file.is_file():
        raise ConfigError("DIR", str(directory), f"holds no {PLAN}, so no sweep was started here", remedy)
    plan = read_json(directory, PLAN)
    missing = [key for key in NEEDED if key not in plan] if isinstance(plan, dict) else NEEDED
    if (
        missing
        or plan["kind"] not in (*KINDS, *seams.growing_kinds())
        or (plan["kind"] != "search" and "jobs" not in plan)
    ):
        rule = f"is not a sweep's plan (needs {', '.join(NEEDED)}, and jobs unless it is a search)"
        raise ConfigError(str(file), "…", rule, "Start a new sweep in another folder")
    if wrong := damage_of(plan):
        raise ConfigError(str(file), "…", f"is damaged: {wrong}", "Correct it, or start a new sweep in another folder")
    return plan


def refuse_record(directory: Path) -> None:
    """Refuse a folder that has the report of a sweep without the folders of its jobs, as a sweep is recorded.

    Raises:
        ConfigError: with the page to read
    """
    page = directory / "report" / "report.md"
    if page.is_file() and not any(each.name.isdigit() for each in directory.iterdir()):
        rule = "is a record: it holds the report of a sweep, and no folders of jobs"
        raise ConfigError("DIR", str(directory), rule, f"Read {page}")


def job_command(plan: Mapping[str, Any], job: Mapping[str, Any], more: Sequence[str] = ()) -> list[str]:
    """Arguments of ``blockwright train`` for one job alone, no sweep even if an experiment's file configures one."""
    return [*plan.get("flags", []), *job["overrides"], "hydra.mode=RUN", *more]


def name_of(job: Mapping[str, Any]) -> str:
    """The name of a job of an arm: stage, arm, size and duration in a ladder, seed, what is tried. Empty in a grid."""
    if "arm" not in job:
        return ""
    tried = {"lr": job["lr"]} if job.get("lr") is not None else job.get("tries", {})
    settings = "".join(f" {path}={value:g}" for path, value in tried.items())
    rung = " ".join(job[key] for key in ("size", "duration") if key in job)
    return " ".join(filter(None, (job.get("stage"), job["arm"], rung, f"seed={job.get('seed')}{settings}")))


def grow(directory: Path, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Append the jobs that follow to a plan on disk, all or none of them.

    Returns:
        these jobs; none if the sweep has ended, or has jobs that have not

    Raises:
        ConfigError: the design gives jobs that no plan can have
    """
    if further := seams.following(directory, plan):
        grown = {**plan, "jobs": [*plan["jobs"], *further]}
        if wrong := damage_of(grown):
            raise ConfigError("kind", plan["kind"], f"has a design whose jobs are wrong: {wrong}", "Correct the design")
        write(directory, grown)
    return further


def is_resumed(sweep: Path) -> bool:
    """Whether this process runs the plan in a folder, and writes none."""
    return os.environ.get(RESUMED) == str(sweep.resolve())


def is_repeated(sweep: Path, argv: Sequence[str]) -> bool:
    """Whether the same command has started this folder's sweep on a host; if so, this process resumes it."""
    if not (sweep / PLAN).exists() or not seams.is_hosted(plan := read(sweep)) or plan.get("argv") != list(argv):
        return False
    os.environ[RESUMED] = str(sweep.resolve())
    return True


def overrides_of(job: Path) -> list[str]:
    """A job's own overrides, without the checkpoint that it resumed from; empty if it was killed while writing them."""
    try:
        found = read_yaml(job, ".hydra/overrides.yaml")
    except ConfigError:  # none, or half a file
        return []
    given = [str(each) for each in found] if isinstance(found, list) else []
    return [o for o in given if not (o.startswith("ckpt_path=") and f"{job.resolve()}/checkpoints" in o)]
