"""A job of a sweep: its result files, and the locks its process holds for the sweep."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.writing import write_json

RESULTS = "results.json"  # in the folder of a job
TRAIN = Path(__file__).resolve().parents[1] / "train.py"  # the command that runs a job
held: dict[Path, int] = {}  # folder → descriptor of its lock, in this process
begun: list[Path] = []  # the folder of this process's multirun


def release(folder: Path) -> None:
    """Release a job's lock, if this process holds it: a launcher's worker may live on."""
    if (lock := held.pop(folder, None)) is not None:
        os.close(lock)


def results_of(job: Path) -> dict[str, Any] | None:
    """The results of a job; None while it is unfinished, or if it was killed while writing them."""
    try:
        found = json.loads((job / RESULTS).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or "status" not in found:
        return None
    given = found.get("metrics")
    kept = {k: v for k, v in given.items() if isinstance(v, int | float)} if isinstance(given, dict) else {}
    return {**found, "metrics": kept}


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
