"""What this process opens, heard from the interpreter, whichever library opens it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_heard: list[list[str]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard and event in ("open", "os.listdir", "os.scandir", "glob.glob") and arguments:
        for names in _heard:
            names.append(str(arguments[0]))


sys.addaudithook(_hear)  # for good: a hook cannot be removed


@contextmanager
def opened(place: Path) -> Iterator[list[str]]:
    """What is opened within at a place or below it; complete once the block has ended."""
    found, names = list[str](), list[str]()
    _heard.append(names)
    try:
        yield found
    finally:
        _heard[:] = [each for each in _heard if each is not names]
        found += [name for name in names if name.startswith(str(place))]
