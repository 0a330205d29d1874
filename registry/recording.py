"""What was built: each block's entry, parameters and children, for code that describes a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockwright.registry.catalogue import Entry

_records: ContextVar[dict[int, Built] | None] = ContextVar("records", default=None)


@dataclass(frozen=True)
class Built:
    """A block that was built.

    Args:
        entry: as registered
        path: of the configuration, where the block is chosen
        block: the object
        settings: parameter → value, defaults included, children left out
        children: parameter → the block built for it, a list of them, or None
    """

    entry: Entry
    path: str
    block: Any
    settings: Mapping[str, Any]
    children: Mapping[str, Any]


@contextmanager
def recorded() -> Iterator[dict[int, Built]]:
    """``id`` of each block that is built within → its record, which keeps the block, and so its ``id``."""
    records: dict[int, Built] = {}
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def note(built: Built) -> None:
    """Record a block, where ``recorded`` is in effect."""
    if (records := _records.get()) is not None:
        records[id(built.block)] = built
