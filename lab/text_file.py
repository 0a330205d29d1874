"""The text of a file that ``--text`` names."""

from __future__ import annotations

from pathlib import Path

from blockwright.registry import ConfigError
from blockwright.registry.limits import read_plain

MAX_BYTES = 2**30  # it is encoded at once, in a hundred times the memory
REMEDY = "Name a file of text in UTF-8"


def read_text_file(file: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: at ``--text``: it is unreadable, no plain file, too long, not UTF-8, or empty
    """
    try:
        text = read_plain(file, "--text", REMEDY, MAX_BYTES).decode()
    except UnicodeDecodeError:
        raise ConfigError("--text", str(file), "cannot be read (it is not UTF-8)", REMEDY) from None
    if not text:
        raise ConfigError("--text", str(file), "is empty", REMEDY)
    return text
