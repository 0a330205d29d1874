"""Replace a file or a folder atomically: a reader sees the old content or the new one, even if the writer is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place at the end, and is removed after an error.

    Args:
        path: of a file; or of a folder, which must not exist or be empty
        partial: the temporary path; None for one that is unique to this process

    Raises:
        OSError: it cannot be written; what was at ``path`` is intact
    """
    partial = partial or path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.partial")
    try:
        yield partial
        for written in [partial, *partial.rglob("*")]:  # or a power failure after the rename would leave zeros
            _to_storage(written)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)  # on a full disk it takes room


def _to_storage(written: Path) -> None:
    """Flush a file, or the names of a folder."""
    descriptor = os.open(written, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
