"""The contract of ``output_gate``: gate the heads' outputs before the output projection. A child of attention."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.registry import family


@family("output_gate", context=("n_heads", "head_dim"))
class OutputGate(Block):
    """``head_dim`` is the width of a head's value."""

    def drawn(self) -> Drawn:
        return Drawn(acts="output")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The attention's input x [B,T,D] and its heads' outputs y [B,T,N,H] → [B,T,N,H]."""
        raise NotImplementedError
