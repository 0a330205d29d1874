"""A job of a sweep: the command that runs it, and the locks that its process holds for the sweep."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_class

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
