"""The folder of a run's checkpoints, and protection of other runs' checkpoints from being overwritten."""

from __future__ import annotations

import re
from dataclasses import replace

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.find import LAST, PREVIOUS, good
from blockwright.training.configuration.run import Run


def settled(run: Run) -> Run:
    """The run with a folder of its own, DIR/<sweep>/<job>, below a ``callbacks.checkpoint.dirpath`` of all jobs."""
    folder, own = run.checkpoints, run.folder.resolve()
    if not run.in_sweep or folder.resolve().is_relative_to(own):
        return run
    keeper = {**run.keeper, "dirpath": str(folder / own.parent.name / own.name)}
    return replace(run, callbacks={**run.callbacks, "checkpoint": keeper})


def refuse_overwriting(run: Run) -> None:
    """Refuse a run that would overwrite checkpoints of another.

    Raises:
        ConfigError: this run's folder has good checkpoints, and it does not resume from there
    """
    if not run.train or run.trainer.get("dry_run") or run.trainer.get("fast_dev_run"):
        return
    if run.ckpt_path is not None and run.owns(run.ckpt_path):
        return
    best = re.sub(r"\{.*?\}", "*", str(run.keeper.get("filename") or "*"))
    written = (path for name in (LAST, PREVIOUS, f"{best}.ckpt") for path in sorted(run.checkpoints.glob(name)))
    other = next(filter(None, map(good, written)), None)
    if other is None:
        return
    inside = run.checkpoints.resolve().is_relative_to(run.folder.resolve())
    key = "hydra.run.dir" if inside else "callbacks.checkpoint.dirpath"
    folder = run.folder if inside else run.checkpoints
    rule = f"holds {other.name} of another run, which this one would overwrite"
    raise ConfigError(key, str(folder), rule, f"Resume that run (ckpt_path={other}), or write another {key}")
