"""Atomic file writes: a reader finds the old content or the new one, whenever the writer is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Raises:
        OSError: it cannot be written; the old content is intact, and nothing else is left
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # else a power failure after the rename leaves a file of zeros
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)  # part of a full disk's room
        raise OSError(error.errno, error.strerror, str(file)) from error  # a write does not say of what


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(file, json.dumps(content, indent=1))
