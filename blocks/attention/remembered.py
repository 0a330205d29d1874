"""What a scored attention remembers of each token: parts side by side in the slots of a cache, its children's notes in
slots behind them, and what crosses depth to the layers that borrow it (blocks/kv_source)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Remembering
from blockwright.blocks.forward_pass import Carry
from blockwright.registry import BlockError

if TYPE_CHECKING:
    from blockwright.blocks.attention.scored import Scored

Held = Mapping[str, Tensor | tuple[Tensor, ...]]
Memory = Mapping[str, Sequence[tuple[int, ...]]]
NOTING = ("position", "scores", "selector")  # children that may have something remembered of each token
COUNTED = "borrowed"  # the slot, of no width, by which a borrower's cache counts tokens


class Layout(NamedTuple):
    """What is remembered of a token: name → the shapes of its parts."""

    shapes: Mapping[str, Sequence[tuple[int, ...]]]

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Of a cache: name → shape of what lies side by side."""
        return {name: (*s[0][:-1], sum(part[-1] for part in s)) for name, s in self.shapes.items()}

    def widths(self) -> dict[str, list[int]]:
        """Name → widths of the parts, where it has several."""
        return {name: [part[-1] for part in s] for name, s in self.shapes.items() if len(s) > 1}

    def apart(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """What a cache holds, slot by slot, what children noted left out → its parts. Of a rank that has some of the
        heads, the first part is narrower, and the others are shared by all."""
        shared = ([part[-1] for part in shapes[1:]] for shapes in self.shapes.values())
        pairs = zip(shared, stored, strict=False)
        return list(chain.from_iterable(t.split((t.shape[-1] - sum(w), *w), -1) if w else (t,) for w, t in pairs))


def layout(held: Held) -> Layout:
    """Of what is given to ``attend``."""
    return Layout({name: [tuple(t.shape[2:]) for t in _tuple(part)] for name, part in held.items()})


def parts(held: Held) -> list[Tensor]:
    """In the order in which they are given."""
    return list(chain.from_iterable(map(_tuple, held.values())))


def side_by_side(part: Tensor | tuple[Tensor, ...]) -> Tensor:
    """As a cache stores it."""
    return torch.cat(part, -1) if isinstance(part, tuple) else part


def _tuple(part: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return part if isinstance(part, tuple) else (part,)


# --- what children note -----------------------------------------------------------------------------------------------


def noting(block: nn.Module) -> dict[str, Remembering]:
    """Kind → child that may note something of each token."""
    children = {kind: getattr(block, kind, None) for kind in NOTING}
    return {kind: child for kind, child in children.items() if child is not None}


def slots(block: Scored) -> dict[str, tuple[int, ...]]:
    """Name → shape of what children note of a token."""
    return {f"{kind}.{name}": shape for kind, child in noting(block).items() for name, shape in child.slots().items()}


def refuse_notes(children: Mapping[str, Remembering | None]) -> None:
    """Refuse children that note something of each key, where some keys are means of tokens.

    Raises:
        BlockError
    """
    for kind, child in children.items():
        if child is not None and child.slots():
            rule = "reads what it notes of each token, and a compressor's keys are means of many"
            raise BlockError(kind, type(child).__name__, rule, "Leave out the compressor, or choose another")


# --- over depth -------------------------------------------------------------------------------------------------------


def line(block: Scored) -> str:
    """The name under which attentions lend to each other: of one window, and of what is remembered in equal shapes."""
    shapes = [f"{name} {'×'.join(map(str, shape))}" for name, shape in block.remembered().slots().items()]
    return f"window {block.window}, {', '.join(shapes)}"


def over_depth(block: Scored, own: Sequence[Tensor], carry: Carry | None, like: Tensor, S: int) -> Sequence[Tensor]:
    """What is attended to of S tokens, slot by slot: ``own``, or what a layer below has left in the ``carry``; what
    layers above may read is left there. Without a cache it is of the tokens of the pass, with one of all that the layer
    sees, and of ranks that share a sequence of this rank's tokens. ``like`` is some tensor [B,·,…] of the pass.

    Raises:
        BlockError: the layer computes with values, makes none, and no layer below lends any
    """
    if (source := block.kv_source) is None:
        return own
    carry, prefix, shapes = {} if carry is None else carry, line(block), block.remembered().slots()
    names = [f"{prefix}: {name}" for name in shapes]
    below = tuple(carry[name] for name in names) if names[0] in carry else None
    if below is None and not source.makes:
        if not like.is_meta:
            rule = f"reads keys and values of a layer below, and none below lends any ({prefix})"
            raise BlockError("kv_source", type(source).__name__, rule, "Give a layer below kv_source: lent")
        below = tuple(
            like.new_empty(len(like), S, *shape, requires_grad=like.requires_grad) for shape in shapes.values()
        )
    found = source(tuple(own) if source.makes else None, below)
    if source.lends:
        carry.update(zip(names, found, strict=True))
    return found
