"""The contract of ``entry``: what enters each visit of a loop. A child of ``loop``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.registry import family

Norm = Callable[[Tensor], Tensor]


@family("entry", context=("visits",), in_layers=False)
class Entry(Block):
    """Makes the input of a visit from the stream and from what entered the loop. Context: ``visits``, r.

    Class attributes:
        one_stream: whether it needs a residual stream [B,T,D]; else it works for several, [B,T,M,D], too
        injects: whether every visit reads what entered the loop, so that layers before it learn from the last visit
    """

    one_stream: ClassVar[bool] = True
    injects: ClassVar[bool] = False
    counted_as: ClassVar[str | None] = "loop"

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        """Streams [B,T,D] → [B,T,D], the input of the visit's first layer.

        Args:
            x: h, after the visit before; in the first visit ``entered``
            entered: e, what entered the loop
            n: index of the visit, from 0. There may be more of them than ``visits``
            norm: of the decoder, after its last layer
        """
        raise NotImplementedError

    def leave(self, x: Tensor, norm: Norm) -> Tensor:
        """The stream after the last visit → what the layers behind the loop read."""
        return x
