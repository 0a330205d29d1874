"""Find the newest undamaged checkpoints."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from blockwright.blocks.checkpoint import manifest
from blockwright.registry import ConfigError
from blockwright.training.configuration.run import Run

LAST, PREVIOUS, MILESTONES = "last.ckpt", "last.previous.ckpt", "step_*.ckpt"


def milestone(checkpoints: Path, step: int) -> Path:
    """The checkpoint of a chosen step, in a run's folder of checkpoints."""
    return checkpoints / f"step_{step}.ckpt"


def newest(runs: Path) -> Path | None:
    """The newest undamaged checkpoint to resume from, among the runs below a folder.

    A damaged one is skipped with a warning.
    """
    return first_good(by_age(runs))


def by_age(runs: Path) -> list[Path]:
    """Every checkpoint to resume from among the runs below a folder, newest first."""
    return inside(*runs.glob("**/checkpoints"))


def inside(*folders: Path) -> list[Path]:
    """Every ``last.ckpt``, its predecessor, and the checkpoints of chosen steps in these folders, newest first.

    A run without validations has no ``last.ckpt`` before its end. One that was killed after its first validation may
    have its best checkpoint alone, which is as whole as the others.
    """
    found = [path for folder in folders for path in _to_resume(folder) or folder.glob("*.ckpt")]
    return sorted(found, key=_time, reverse=True)


def _to_resume(folder: Path) -> list[Path]:
    return [path for name in (LAST, PREVIOUS, MILESTONES) for path in folder.glob(name)]


def first_good(candidates: Iterable[Path]) -> Path | None:
    """The first undamaged checkpoint; each damaged one before it is skipped with a warning."""
    return next(_good(candidates), None)


def good(path: Path) -> Path | None:
    """A checkpoint if it is undamaged, else its predecessor, with a warning; None if both are damaged."""
    return first_good([path, path.with_name(PREVIOUS)] if path.name == LAST else [path])


def _good(candidates: Iterable[Path]) -> Iterator[Path]:
    for path in candidates:
        try:
            if path.exists():
                manifest.check(path)
                yield path
        except (manifest.Damaged, OSError) as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=3)


def _time(path: Path) -> float:
    try:
        return (path / manifest.MANIFEST if path.is_dir() else path).stat().st_mtime
    except OSError:
        return 0.0


# --- the folder of a run's checkpoints, and protection of other runs' checkpoints from being overwritten ---


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
