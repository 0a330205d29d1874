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
        if partial.is_file():
            _to_storage(partial)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)  # on a full disk it takes room


def _to_storage(file: Path) -> None:
    """Flush a file, or a power failure after the rename would leave zeros."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
