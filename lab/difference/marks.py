"""Which boxes of a picture differ from the other model's: ``same``, ``changed``, or ``added``, only in this one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from blockwright.lab.difference.counterparts import Pair
from blockwright.lab.difference.difference import Difference
from blockwright.lab.difference.entries import ABSENT, Entry
from blockwright.lab.difference.settings import Name
from blockwright.lab.drawing.parts import Panel, Scheme

Letter = Literal["a", "b"]
SAME, CHANGED, ADDED = "same", "changed", "added"
# A part of the decoder that is no block → the settings that it has.
PARTS = {
    "embedding": ("vocab_size", "d_model", "scale_embeddings"),
    "head": ("vocab_size", "d_model", "tie_embeddings", "logit_softcap"),
}
PREDICTIONS = "mtp"


def marks(found: Difference, scheme: Scheme, side: Letter) -> dict[str, str]:
    """Path of a box → its mark.

    Args:
        found: the difference of A and B
        scheme: of one of them
        side: which one it is
    """
    made = dict(_blocks(found.model, side))
    for path, keys in PARTS.items():
        differs = any(not entry.same for entry in found.model if entry.path in keys)
        made[path] = CHANGED if differs else SAME
    made |= {box.path: _of_predictions(k, found, side) for k, box in enumerate(scheme.mtp)}
    for panel in scheme.panels:
        inner = dict(_of_panel(panel, found.layers, side))
        made |= inner
        if set(inner.values()) == {SAME}:
            made[panel.path] = SAME
    return made


def _of_predictions(k: int, found: Difference, side: Letter) -> str:
    """The mark of a depth of multi-token prediction, counted from 0."""
    other = found.b if side == "a" else found.a
    if k >= len(other.model.decoder.mtp):
        return ADDED
    differing = [entry.path for entry in found.model if not entry.same and entry.path != f"{PREDICTIONS}.depth"]
    return CHANGED if any(path.partition(".")[0] == PREDICTIONS for path in differing) else SAME


def _of_panel(panel: Panel, pairs: Sequence[Pair], side: Letter) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        group = getattr(pair, side)
        if group is not None and panel.layers[0] in group.layers:
            yield from ((f"{panel.path}.{path}", mark) for path, mark in _blocks(pair.entries, side))


def _blocks(entries: Iterable[Entry], side: Letter) -> Iterator[tuple[str, str]]:
    """The blocks of one side among the entries, each with the mark of its own settings, its children's left out."""
    every = list(entries)
    names = {entry.path for entry in every if isinstance(entry.a, Name) or isinstance(entry.b, Name)}
    differing = {_block_of(entry.path, names) for entry in every if not entry.same}
    for entry in every:
        if entry.path in names and getattr(entry, side) is not ABSENT:
            lacking = entry.a is ABSENT or entry.b is ABSENT
            yield entry.path, ADDED if lacking else CHANGED if entry.path in differing else SAME


def _block_of(path: str, names: set[str]) -> str:
    """The innermost block that a setting is of: itself, if it is the name of one."""
    while path and path not in names:
        path = path.rpartition(".")[0]
    return path
