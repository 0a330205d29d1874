"""Replace a file or a folder atomically: a reader sees the old content or the new one, even if the writer is killed."""

from __future__ import annotations

import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place at the end, and is removed after an error.

    What a writer of this path that was killed has left is removed too.

    Args:
        path: of a file; or of a folder, which must not exist or be empty
        partial: the temporary path; None for one that is unique to this process

    Raises:
        OSError: it cannot be written; what was at ``path`` is intact
    """
    path, here = path.absolute(), _here()
    partial = partial or path.with_name(f".{path.name}.{here}.{os.getpid()}.partial")
    for left in path.parent.glob(f".{glob.escape(f'{path.name}.{here}')}.*.partial"):
        if _has_ended(left.name.split(".")[-2]):
            with suppress(OSError):
                _remove(left)
    try:
        yield partial
        for written in [partial, *partial.rglob("*")]:  # or a power failure after the rename would leave zeros
            _to_storage(written)
        os.replace(partial, path)
    finally:
        _remove(partial)  # on a full disk it takes room


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def _here() -> str:
    """Within what a process id is unique: a kernel since it booted, and one of its process namespaces (containers)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{boot}_{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return platform.node()


def _has_ended(process: str) -> bool:
    """Whether no process has this id; False where that cannot be known."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):  # of another user; not a name of ours
        pass
    return False


def _to_storage(written: Path) -> None:
    """Flush a file, or the names of a folder."""
    descriptor = os.open(written, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
