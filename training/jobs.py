"""A job of a sweep: the command that runs it, and the locks that its process holds for the sweep."""

from __future__ import annotations

import os
from pathlib import Path

MODULE = "blockwright.train"  # runs a job
TRAIN = ("-m", MODULE)  # Python's arguments for it
held: dict[Path, int] = {}  # folder → descriptor of its lock, in this process
begun: list[Path] = []  # the folder of this process's multirun


def release(folder: Path) -> None:
    """Release a job's lock, if this process holds it: a launcher's worker may live on."""
    if (lock := held.pop(folder, None)) is not None:
        os.close(lock)
