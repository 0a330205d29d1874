"""Layers of two models side by side: those of one model that are alike are a group, and each has its counterpart.

A part of a layer is grouped alone: in DeepSeek-V2 and V3 all layers have one attention, and two feed-forward blocks,
of which the dense one fills one layer there and three here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from blockwright.lab.difference.settings import Entry, compared
from blockwright.lab.drawing.figures import ranges

Settings = Mapping[str, Any]
SHOWN = 3  # ranges of layers that are written out


@dataclass(frozen=True)
class Group:
    """The layers of a model whose part is the same.

    Args:
        layers: their indices
        settings: of the part
    """

    layers: tuple[int, ...]
    settings: Settings


@dataclass(frozen=True)
class Pair:
    """A group of A and its counterpart in B; one of them is None where the other model has nothing like it.

    Args:
        part: of the layers, such as ``ffn``
        a, b: the groups
    """

    part: str
    a: Group | None
    b: Group | None

    @property
    def entries(self) -> list[Entry]:
        return compared(self.a.settings if self.a else {}, self.b.settings if self.b else {})

    @property
    def same(self) -> bool:
        """Whether both have it with the same settings, in whichever layers."""
        return all(entry.same for entry in self.entries)

    def to_plain(self) -> dict[str, Any]:
        sides = {"a": self.a, "b": self.b}
        layers = {name: list(group.layers) for name, group in sides.items() if group}
        return {"part": self.part, "layers": layers, "settings": [entry.to_plain() for entry in self.entries]}


def grouped(layers: Sequence[Settings]) -> list[Group]:
    """The groups of a model's layers, in order of their first layers; those without the part are in none."""
    found: list[tuple[list[int], Settings]] = []
    for layer, settings in ((layer, own) for layer, own in enumerate(layers) if own):
        members = next((members for members, known in found if known == settings), None)
        if members is None:
            found.append(([layer], settings))
        else:
            members.append(layer)
    return [Group(tuple(members), settings) for members, settings in found]


def aligned(part: str, a: Sequence[Group], b: Sequence[Group]) -> list[Pair]:
    """Each group of one model with the group of the other that is most alike, the most alike first to choose.

    Of counterparts that are equally alike, the nearest in order is chosen. A group that is left has none.
    """
    by_likeness = sorted(
        product(range(len(a)), range(len(b))),
        key=lambda pair: (-likeness(a[pair[0]].settings, b[pair[1]].settings), abs(pair[0] - pair[1]), pair),
    )
    chosen: dict[int, int] = {}
    taken: set[int] = set()
    for ours, theirs in by_likeness:
        if ours not in chosen and theirs not in taken:
            chosen[ours] = theirs
            taken.add(theirs)
    pairs = [Pair(part, group, b[chosen[i]] if i in chosen else None) for i, group in enumerate(a)]
    return pairs + [Pair(part, None, group) for i, group in enumerate(b) if i not in taken]


def likeness(a: Settings, b: Settings) -> float:
    """From 0 to 1: the share of equal settings. A number against another counts half, so that a window is like one."""
    entries = compared(a, b)
    return sum(1.0 if entry.same else 0.5 * _are_numbers(entry.a, entry.b) for entry in entries) / len(entries)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def spelt(group: Group | None, n_layers: int) -> str:
    """The layers of a group: ``all 60``, ``0``, ``1–59``; of a long pattern how many, and the first."""
    if group is None:
        return "–"
    if len(group.layers) == n_layers:
        return f"all {n_layers}"
    written = ranges(group.layers)
    if len(written) <= SHOWN:
        return ", ".join(written)
    return f"{len(group.layers)} of {n_layers}: {written[0]}, …"
