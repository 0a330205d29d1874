"""Which checkpoint to go on from: the newest that is undamaged."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from blocks import manifest

LAST, PREVIOUS = "last.ckpt", "last.previous.ckpt"


def newest(runs: Path) -> Path | None:
    """The newest good ``last.ckpt``, or its predecessor, among the runs below a folder.

    A damaged one is told of in a warning, and the next is looked at.
    """
    found = [*runs.glob(f"**/checkpoints/{LAST}"), *runs.glob(f"**/checkpoints/{PREVIOUS}")]
    return next(_good(sorted(found, key=_time, reverse=True)), None)


def good(path: Path) -> Path | None:
    """A checkpoint if it is undamaged, else its predecessor if that is, with a warning; None if neither is."""
    return next(_good([path, path.with_name(PREVIOUS)] if path.name == LAST else [path]), None)


def _good(candidates: Iterable[Path]) -> Iterator[Path]:
    for path in candidates:
        try:
            if path.exists():
                manifest.check(path)
                yield path
        except (manifest.Damaged, OSError) as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=3)


def _time(path: Path) -> float:
    try:
        return (path / manifest.MANIFEST if path.is_dir() else path).stat().st_mtime
    except OSError:
        return 0.0
