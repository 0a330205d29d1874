"""What the children of an attention read of its tokens, and have its cache hold of each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from blockwright.blocks.base import Block


class Queries(NamedTuple):
    """The T tokens that attend.

    x: [B,T,D], the attention's input
    q: [B,T,N,H], its queries, rotated
    positions: [B|1,T]
    """

    x: Tensor
    q: Tensor
    positions: Tensor

    def rows(self, rows: slice) -> Queries:
        """Some of the tokens."""
        return Queries(*(t[:, rows] for t in self))


class Keys(NamedTuple):
    """The S tokens that are attended to, those that attend included.

    positions: [B|1,S], of each in its document
    order: [S], by which they are sorted in time; the last T are those that attend. A ring gives keys as it stores them
    noted: [B,S,…] for each of the child's ``slots``
    """

    positions: Tensor
    order: Tensor
    noted: tuple[Tensor, ...] = ()


class Remembering(Block):
    """A child of attention that may have something remembered of each token, next to the attention's own.

    What it notes is cached, quantised, rewound, moved and sent as keys and values are.
    """

    def slots(self) -> dict[str, tuple[int, ...]]:
        """What it has cached of each token: name → shape."""
        return {}

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        """Values [B,T,…] for each slot.

        Args:
            x: [B,T,D], the attention's input
            positions: [B|1,T]
            declared: tokens that the sequences are declared to have, or [B] each, for ``Position.rotate_in``
        """
        return ()

    def neutral(self) -> dict[str, Tensor] | None:
        """Values of some of its parameters with which an attention computes what it does without it, or with its
        ``inner`` alone: a trained model may begin there. None, the default, where there are none to learn from."""
        return None
