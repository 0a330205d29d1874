"""Who is at work in a sweep's folder. The kernel lets go of these locks when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from registry import ConfigError

LOCK = ".lock"


def take(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed, by this process and all that have inherited it.

    Returns:
        the descriptor; None if somebody else has the lock
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def holder(folder: Path) -> int | None:
    """The process that has locked a folder, if it lives; None too where that is not known."""
    try:
        return int((folder / LOCK).read_text()) if is_taken(folder) else None
    except (OSError, ValueError):
        return None


def is_taken(folder: Path) -> bool:
    """Whether a process that lives has locked the folder; leaves nothing behind."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
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
    """Lock a sweep whose jobs are to be run.

    Raises:
        ConfigError: it, or a job that has outlived it, is still running
    """
    running = [job.name for job in sweep.iterdir() if job.name.isdigit() and is_taken(job)]
    descriptor = None if running else take(sweep)
    if descriptor is None:
        which = f" (job {', '.join(sorted(running, key=int))})" if running else ""
        rule = f"is still running{which}"
        raise ConfigError("DIR", str(sweep), rule, f"Look with: python -m lab.sweep status {sweep}")
    return descriptor
