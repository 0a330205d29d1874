"""Folders of a run's checkpoints, and protection of other runs' checkpoints from being overwritten.

A sweep's job has its own folder under ``callbacks.checkpoint.dirpath`` too: DIR/<sweep>/<job>.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.find import LAST, PREVIOUS, good

SWEEP = "plan.json"  # in a sweep's folder, which contains the jobs' folders
FOLDER = "checkpoints"  # of a run


@dataclass(frozen=True)
class Place:
    """The folders of a run.

    Args:
        run: its own folder
        checkpoints: where its checkpoints go
        in_sweep: whether it is a sweep's job
    """

    run: Path
    checkpoints: Path
    in_sweep: bool

    def holds(self, checkpoint: str | Path) -> bool:
        """Whether a checkpoint is in this run's own folder."""
        return Path(checkpoint).resolve().parent == self.checkpoints.resolve()


def settle(plain: dict[str, Any]) -> Place:
    """Find the folders of a run, and give a sweep's job its own below a ``dirpath`` shared by all jobs.

    Args:
        plain: the configuration; ``callbacks.checkpoint.dirpath`` of a job is changed in place
    """
    run = Path(plain["paths"]["output_dir"])
    in_sweep = (run.resolve().parent / SWEEP).is_file()
    keeper = _keeper(plain)
    folder = Path(keeper["dirpath"]) if keeper.get("dirpath") else run / FOLDER
    if in_sweep and not folder.resolve().is_relative_to(run.resolve()):
        folder = folder / run.resolve().parent.name / run.name
        keeper["dirpath"] = str(folder)
    return Place(run, folder, in_sweep)


def place_of(plain: Mapping[str, Any]) -> Place:
    """The folders of a run whose configuration was processed by ``settle``."""
    run = Path(plain["paths"]["output_dir"])
    folder = _keeper(plain).get("dirpath") or run / FOLDER
    return Place(run, Path(folder), (run.resolve().parent / SWEEP).is_file())


def _keeper(plain: Mapping[str, Any]) -> dict[str, Any]:
    return (plain["callbacks"] or {}).get("checkpoint") or {}


def refuse_overwriting(plain: Mapping[str, Any], place: Place) -> None:
    """Refuse a run that would overwrite checkpoints of another.

    Args:
        plain: the configuration, its ``ckpt_path`` a file or None
        place: of this run

    Raises:
        ConfigError: this run's folder has good checkpoints, and it does not resume from there
    """
    trainer, checkpoint = plain["trainer"], plain["ckpt_path"]
    if not plain["train"] or trainer.get("dry_run") or trainer.get("fast_dev_run"):
        return
    if checkpoint is not None and place.holds(checkpoint):
        return
    best = re.sub(r"\{.*?\}", "*", str(_keeper(plain).get("filename") or "*"))
    written = (path for name in (LAST, PREVIOUS, f"{best}.ckpt") for path in sorted(place.checkpoints.glob(name)))
    other = next(filter(None, map(good, written)), None)
    if other is None:
        return
    inside = place.checkpoints.resolve().is_relative_to(place.run.resolve())
    key = "hydra.run.dir" if inside else "callbacks.checkpoint.dirpath"
    folder = place.run if inside else place.checkpoints
    rule = f"holds {other.name} of another run, which this one would overwrite"
    raise ConfigError(key, str(folder), rule, f"Resume that run (ckpt_path={other}), or write another {key}")
