"""Files that are replaced as a whole: a stage that is killed, or finds the disk full, leaves the old one or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A temporary path beside a file, of the same suffix, which takes its place at the end.

    Raises:
        OSError: it cannot be written; an old file is intact
    """
    partial = file.with_name(f".{file.stem}.{os.getpid()}.partial{file.suffix}")
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # else a power failure after the rename leaves a file of zeros
        finally:
            os.close(descriptor)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
