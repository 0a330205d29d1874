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

    def settled(self, name: str) -> Any:
        """The value of a parameter; for null what the block has under this name, if that is a plain value."""
        value = self.settings[name]
        made = getattr(self.block, name, None) if value is None else value
        return made if isinstance(made, int | float | str | list | tuple) else value

    def slots(self) -> Iterator[tuple[str, Any]]:
        """Parameter and child, of a list each with its index: ``balance.0``; none for null."""
        for name, child in self.children.items():
            each = [(f"{name}.{i}", one) for i, one in enumerate(child)] if isinstance(child, list) else [(name, child)]
            yield from ((slot, one) for slot, one in each if one is not None)


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
