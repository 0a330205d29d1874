"""Who is still writing: locks that the kernel releases when their process ends, however it ends.

A process id says nothing across containers, which may share a host name and a folder but not their processes, nor
across machines; and a folder's time of change stands still while the files in it grow. So a writer holds an ``flock``
on a small file beside what it writes, for as long as it writes, and others test that lock.

* Local disks, and containers of one machine: the lock is decisive, in every pid namespace.
* NFS on Linux: ``flock`` is passed on to the server, so writers on other machines are seen as well, and a lock goes
  with its machine when the server notices that it has gone (v4: when its lease ends). Mounted with ``nolock`` or
  ``local_lock=flock``, machines do not see one another's locks. Hence a free lock is believed only if this very
  kernel (by its boot id) gave it; else nothing counts as abandoned until no file of it has changed for a day.
* A file system without locks: that rule of a day alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

ABANDONED_S = 24 * 3600
OWNER = r"[A-Za-z0-9-]+-[0-9a-f]{8}-[0-9a-f]{12}"  # what new_owner gives: host, kernel, something unique
_LOCK = re.compile(rf"\.({OWNER})\.lock\Z")
_log = logging.getLogger(__name__)


def new_owner() -> str:
    """A name for one act of writing, unlike any other's, to be part of the names of what is written."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]
    return f"{host}-{_kernel()}-{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def claimed(folder: Path, owner: str) -> Iterator[None]:
    """Inside, what bears the owner's name in a folder is alive; to be entered before any of it is there.

    Raises:
        OSError: the folder cannot be written
    """
    lock = _lock(folder, owner)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def alone(lock: Path, doing: str) -> Iterator[None]:
    """Wait until no other process is inside for the same lock file; where a file system has no locks, do not wait.

    Now and then two get in, when one comes as another leaves, so the work inside must bear that.

    Args:
        lock: made, and removed at the end
        doing: what the other process does, to tell a person who waits for it
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that is %s (it holds %s)", doing, lock)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def is_abandoned(path: Path, owner: str | None) -> bool:
    """Whether whoever wrote a file or folder has ended, as far as can be known.

    Args:
        path: what was written, in the folder that was claimed
        owner: in whose name; None if it bears none, as with older versions
    """
    is_free = _is_free(_lock(path.parent, owner)) if owner else None
    if is_free is False:
        return False
    if is_free and owner and owner.split("-")[-2] == _kernel():
        return True
    return time.time() - _changed(path) > ABANDONED_S


def forget(folder: Path, owner: str | None) -> None:
    """Remove the lock of an owner whose work has been removed."""
    if owner:
        _lock(folder, owner).unlink(missing_ok=True)


def remove_old_locks(folder: Path) -> None:
    """Remove locks that nobody has held for a day: of processes that were killed before they wrote anything."""
    for lock in folder.glob(".*.lock"):
        if _LOCK.match(lock.name) and _is_free(lock) and time.time() - _changed(lock) > ABANDONED_S:
            lock.unlink(missing_ok=True)


def _lock(folder: Path, owner: str) -> Path:
    return folder / f".{owner}.lock"


def _is_free(lock: Path) -> bool | None:
    """None where that cannot be known."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _changed(path: Path) -> float:
    """When anything of a file or folder last changed; now, for one that is vanishing."""
    try:
        return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _kernel() -> str:
    """Of the running kernel, 8 hexadecimal digits: the same in all containers of a machine, until it boots anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:  # not Linux
        return uuid.uuid5(uuid.NAMESPACE_DNS, socket.gethostname()).hex[:8]
