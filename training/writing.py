"""Files that are written atomically."""

from __future__ import annotations

import json
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
