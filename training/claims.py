"""Locks that show whether a writer is alive: the kernel releases them when the process ends, for any reason.

A process id is meaningless across containers, which may share a host name and a folder but not their processes, and
across machines; and a folder's modification time does not change while its files grow. So a writer holds an ``flock``
on a small file beside what it writes, as long as it writes, and others test that lock.

* Local disks, and containers on one machine: the lock is decisive, in every pid namespace.
* NFS on Linux: ``flock`` is forwarded to the server, so writers on other machines are seen too, and a lock is released
  when the server notices that its machine is gone (v4: when its lease ends). Mounted with ``nolock`` or
  ``local_lock=flock``, machines do not see each other's locks. Hence a free lock counts only if this kernel (by its
  boot id) granted it; otherwise nothing counts as abandoned until none of its files has changed for a day.
* File systems without locks: only that rule of a day.
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

from blockwright.registry import ConfigError
from blockwright.registry.folder import read_text

ABANDONED_S = 24 * 3600
LOCK = ".lock"  # of a folder that one process writes: its process id, and its kernel
OWNER = r"[A-Za-z0-9-]+-[0-9a-f]{8}-[0-9a-f]{12}"  # of new_owner: host, kernel, unique id
_LOCK = re.compile(rf"\.({OWNER})\.lock\Z")
_log = logging.getLogger(__name__)


def new_owner() -> str:
    """A unique name for one writer, used in the names of the files it writes."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]
    return f"{host}-{_kernel()}-{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def claimed(folder: Path, owner: str) -> Iterator[None]:
    """Context in which files with the owner's name in a folder count as in use; enter it before creating any.

    Raises:
        OSError: the folder cannot be written
    """
    lock = _lock(folder, owner)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # others have it only while they look whether it is free
        if _is_file(descriptor, lock):
            break
        os.close(descriptor)  # before it was locked, it was taken for a killed writer's, and removed
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def take(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed by this process and all that have inherited it.

    Returns:
        the descriptor; None if another process has the lock
    """
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_file(descriptor, folder / LOCK):
            break
        os.close(descriptor)  # of a writer that has ended meanwhile, and removed it: others do not see this lock
    os.truncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} {_kernel()}".encode())
    return descriptor


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Context in which other processes of this machine see that a folder is written; whether none does already.

    A lock that another machine holds does not count: a file server keeps it for a while after that machine is gone, and
    a run that is started again elsewhere must not wait for it. Nor does one on a file system without locks.
    """
    try:
        descriptor = take(folder)
    except OSError:
        yield True
        return
    if descriptor is None:
        yield _kernel_of(folder / LOCK) not in (_kernel(), None)
        return
    try:
        yield True
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before it is free: later, it may be the next writer's
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is of the file that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _kernel_of(lock: Path) -> str | None:
    """The kernel that a lock names; None where its process has just taken it, or just ended."""
    try:
        words = lock.read_text().split()
    except FileNotFoundError:
        return None
    return words[1] if len(words) == 2 else None


@contextlib.contextmanager
def alone(lock: Path, doing: str) -> Iterator[None]:
    """Wait until no other process is inside for the same lock file; without file locks, do not wait.

    Rarely two get in, when one arrives as another leaves, so the work inside must tolerate that.

    Args:
        lock: created, and removed at the end
        doing: what the other process does, for the log message of a waiting process
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
    """Whether the writer of a file or folder has ended, as far as can be known.

    Args:
        path: what was written, in the claimed folder
        owner: its writer; None if the name has none, as with older versions
    """
    is_free = _is_free(_lock(path.parent, owner)) if owner else None
    if is_free is False:
        return False
    if is_free and owner and owner.split("-")[-2] == _kernel():
        return True
    return time.time() - _changed(path) > ABANDONED_S


def forget(folder: Path, owner: str | None) -> None:
    """Remove the lock of an owner whose files have been removed."""
    if owner:
        _lock(folder, owner).unlink(missing_ok=True)


def remove_old_locks(folder: Path) -> None:
    """Remove locks of processes that were killed when they had not written anything else, or nothing any more."""
    for lock in folder.glob(".*.lock"):
        if (of := _LOCK.match(lock.name)) and is_abandoned(lock, of[1]):
            lock.unlink(missing_ok=True)


def _lock(folder: Path, owner: str) -> Path:
    return folder / f".{owner}.lock"


def _is_free(lock: Path) -> bool | None:
    """Whether a lock is free; None if unknown."""
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
    """Last modification time of anything in a file or folder; now, if it is being removed."""
    try:
        return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _kernel() -> str:
    """The running kernel as 8 hexadecimal digits: equal in all containers of a machine until it reboots."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:  # not Linux
        return uuid.uuid5(uuid.NAMESPACE_DNS, socket.gethostname()).hex[:8]


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
