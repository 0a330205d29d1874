"""What the children of a scored attention have remembered of each token, in slots of its cache behind its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from blockwright.blocks.base import Remembering
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import BlockError

if TYPE_CHECKING:
    from blockwright.blocks.attention.scored import Scored


class Notes(NamedTuple):
    """[B,·,…] for each slot of each child."""

    position: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()
    selector: tuple[Tensor, ...] = ()

    def side_by_side(self) -> Iterator[Tensor]:
        """In the order of ``slots``."""
        return chain.from_iterable(self)


def slots(block: Scored) -> dict[str, tuple[int, ...]]:
    """Name → shape of what its children have remembered of a token."""
    children = zip(Notes._fields, _children(block), strict=True)
    return {f"{kind}.{n}": shape for kind, child in children if child is not None for n, shape in child.slots().items()}


def noted(block: Scored, x: Tensor, given: Pass) -> Notes:
    """What they note of tokens x [B,T,D]."""
    children = _children(block)
    return Notes(*(() if c is None else c.remember(x, given.positions, given.declared) for c in children))


def apart(block: Scored, stored: Sequence[Tensor]) -> Notes:
    """What a cache returns of ``slots``, child by child."""
    left = iter(stored)
    return Notes(*(() if c is None else tuple(next(left) for _ in c.slots()) for c in _children(block)))


def refuse_notes(children: Mapping[str, Remembering | None]) -> None:
    """Refuse children that note something of each key, where some keys are means of tokens.

    Raises:
        BlockError
    """
    for kind, child in children.items():
        if child is not None and child.slots():
            rule = "reads what it notes of each token, and a compressor's keys are means of many"
            raise BlockError(kind, type(child).__name__, rule, "Leave out the compressor, or choose another")


def _children(block: Scored) -> tuple[Remembering | None, ...]:
    return block.position, block.scores, block.selector
