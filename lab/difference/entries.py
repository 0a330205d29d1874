"""Two mappings of paths to values, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Absent:
    """Stands for the value of a side that has no such path; null is a value."""

    def __repr__(self) -> str:
        return "–"


ABSENT = Absent()


@dataclass(frozen=True)
class Entry:
    """A path with its values in A and in B; ``ABSENT`` where a side has none."""

    path: str
    a: Any
    b: Any

    @property
    def same(self) -> bool:
        return alike(self.a, self.b)

    def to_plain(self) -> dict[str, Any]:
        """For JSON: ``path``, ``same``, and ``a`` and ``b`` for each side that has it."""
        values = {"a": self.a, "b": self.b}
        return {"path": self.path, "same": self.same, **{k: v for k, v in values.items() if v is not ABSENT}}


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Entry]:
    """Every path of either side: in A's order, each of B alone after the one that precedes it in B."""
    following: dict[str | None, list[str]] = {}
    before = None
    for path in b:
        if path in a:
            before = path
        else:
            following.setdefault(before, []).append(path)
    order = [*following.get(None, ()), *(each for path in a for each in (path, *following.get(path, ())))]
    return [Entry(path, a.get(path, ABSENT), b.get(path, ABSENT)) for path in order]


def alike(a: Any, b: Any) -> bool:
    """Equal values: 1 is 1.0, but not true, and NaN is NaN."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and (a == b or (a != a and b != b))
