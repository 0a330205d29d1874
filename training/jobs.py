"""A job of a sweep: its result files, and the locks its process holds for the sweep."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json
from blockwright.training.writing import write_json

RESULTS = "results.json"  # in the folder of a job
NUMBERS = ("parameters", "active_parameters", "steps", "save_seconds", "fit_seconds")  # of it, beside its metrics
MODULE = "blockwright.train"  # runs a job
TRAIN = ("-m", MODULE)  # Python's arguments for it
HOST = "BLOCKWRIGHT_HOST"  # environment variable of a job that does not run on the machine of its sweep: what runs it
held: dict[Path, int] = {}  # folder → descriptor of its lock, in this process
begun: list[Path] = []  # the folder of this process's multirun


def host_of(launcher: Mapping[str, Any]) -> str | None:
    """The host that a launcher of Hydra hands its jobs to, by the node that configures it; None for this machine."""
    return getattr(get_class(launcher["_target_"]), "host", None)


def release(folder: Path) -> None:
    """Release a job's lock, if this process holds it: a launcher's worker may live on."""
    if (lock := held.pop(folder, None)) is not None:
        os.close(lock)


def results_of(job: Path) -> dict[str, Any] | None:
    """The results of a job, of its figures those that are numbers.

    None while it is unfinished, or if it was killed while writing them.
    """
    try:
        found = read_json(job, RESULTS)
    except ConfigError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("status"), str):
        return None
    figures = {name: value for name, value in found.items() if name not in NUMBERS or _is_number(value)}
    given = found.get("metrics")
    metrics = {name: value for name, value in given.items() if _is_number(value)} if isinstance(given, dict) else {}
    if not isinstance(found.get("reason"), str):
        figures.pop("reason", None)
    return {**figures, "metrics": metrics}


def _is_number(value: Any) -> bool:
    """Also NaN and infinity, which a run writes; an integer that no float can hold is none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) or (whole and abs(value) <= sys.float_info.max)


def record_failure(
    directory: Path, reason: str, status: str = "failed", metrics: Mapping[str, float] | None = None
) -> None:
    """Write the result of a job that ended early where ``summarise`` finds it, with the figures it had.

    Args:
        directory: of the job
        reason: human-readable
        status: ``failed``, ``diverged`` or ``pruned``
        metrics: figures to add
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = results_of(directory) or {}
    more = {"metrics": {**figures.get("metrics", {}), **metrics}} if metrics else {}
    write_json(directory / RESULTS, {**figures, **more, "status": status, "reason": reason})
