"""The contract of ``values``: change the values of an attention before they are cached and read."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.carry import Carry
from blockwright.blocks.drawn import Drawn
from blockwright.registry import family


@family("values")
class Values(Block):
    """A child of attention."""

    def drawn(self) -> Drawn:
        return Drawn(acts="values")

    def forward(self, v: Tensor, carry: Carry | None) -> Tensor:
        """Values [B,T,K,V] → [B,T,K,V]; ``carry`` as in blocks/carry.py."""
        raise NotImplementedError
