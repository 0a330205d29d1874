"""flock-based locks for sweep folders. The kernel releases them when their process ends, for any reason."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from blockwright.registry import ConfigError
from blockwright.registry.folder import read_text
from blockwright.training.claims import LOCK, take


def holder(folder: Path) -> int | None:
    """The process that has locked a folder; None if there is none, or it is unknown."""
    try:
        return int(read_text(folder, LOCK).split()[0]) if is_taken(folder) else None
    except (OSError, ValueError, IndexError):
        return None


def is_taken(folder: Path) -> bool:
    """Whether a running process has locked the folder; leaves nothing behind."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def take_sweep(sweep: Path) -> int:
    """Lock a sweep to run its jobs.

    Raises:
        ConfigError: the sweep, or a job that has outlived it, is still running
    """
    running = [job.name for job in sweep.iterdir() if job.name.isdigit() and is_taken(job)]
    descriptor = None if running else take(sweep)
    if descriptor is None:
        which = f" (job {', '.join(sorted(running, key=int))})" if running else ""
        rule = f"is still running{which}"
        raise ConfigError("DIR", str(sweep), rule, f"Check with: blockwright sweep status {sweep}")
    return descriptor
