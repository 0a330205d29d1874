"""Files that are replaced as a whole, and files that only grow: whatever ends a writer, what was there before stays."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from blockwright.registry.replacing import replaced


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Raises:
        OSError: it cannot be written; the old content is intact, and nothing else is left
    """
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically; errors as in ``write_text``."""
    try:
        with replaced(file) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error  # a failed write does not name its file


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(file, json.dumps(content, indent=1))


def append_lines(file: Path, text: str) -> None:
    """Append whole lines to a text file, all of them or none, at once: lines of several writers stay apart.

    A last line that a killed writer has cut is ended first, so that it spoils no other.

    Raises:
        OSError: they cannot be written
    """
    with file.open("a+b", buffering=0) as opened:
        end = opened.seek(0, os.SEEK_END)
        if end:
            opened.seek(end - 1)
        content = (b"\n" if end and opened.read(1) != b"\n" else b"") + text.encode()
        try:
            if opened.write(content) < len(content):  # the rest did not fit
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if file.stat().st_size > end:
                os.truncate(opened.fileno(), end)
            raise OSError(error.errno, error.strerror, str(file)) from error
