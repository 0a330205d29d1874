"""What names a cache: digests of the whole state of what shaped it, rather than of settings that someone has chosen.

A setting that is added to a format, a tiling or a corpus is in the name from then on. What is left out is said where it
is left out, with a reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest(*parts: Any) -> str:
    """Hexadecimal digest of plain data, and of the ``state`` of everything else in it."""
    return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True).encode()).hexdigest()


def state(thing: Any, left_out: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The class of an object and its public attributes, those of its parts too, as plain data.

    Private attributes are left out: they are made of public ones, or given to ``digest`` by who makes them otherwise.
    So are parameters and buffers of modules, which training changes.

    Args:
        thing: an object whose attributes are plain, or objects of plain attributes
        left_out: attribute → why nothing depends on it

    Raises:
        TypeError: an attribute is neither, a function for instance: it cannot be compared, so it must be left out
    """
    names = {name: value for name, value in vars(thing).items() if not name.startswith("_")}
    skipped = {*(left_out or {})}
    if _is_module(thing):
        names |= dict(thing.named_children())
        skipped |= {"training"}
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    return {"": kind, **{name: _plain(value) for name, value in names.items() if name not in skipped}}


def of_file(path: Path) -> str:
    """Hexadecimal digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(each)] for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(each) for each in value), key=repr)
    if (callable(value) and not _is_module(value)) or not hasattr(value, "__dict__"):
        raise TypeError(f"{value!r} cannot be compared with that of another run: leave it out, and say why")
    return state(value)


def _is_module(value: Any) -> bool:
    """Whether it is an ``nn.Module``; without importing torch, which preparing text does not need."""
    return hasattr(value, "named_children")
