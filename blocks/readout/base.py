"""The contract of ``readout``: what becomes of each head's sum over values. A child of attention by scores."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.registry import family


@family("readout", context=("n_heads", "n_kv_heads", "head_dim"))
class Readout(Block):
    """It sees the sums, the values of the token itself and the attention's input. ``output_gate`` follows it.

    ``head_dim`` is the width of a head's value. An attention takes one by ``readout: Readout | None = None`` and sets
    ``self.readout``; it has ``readout.heads(n_heads)`` heads left for its output projection.
    """

    def drawn(self) -> Drawn:
        return Drawn(acts="output")

    def heads(self, n_heads: int) -> int:
        """Heads that are left of N; by default all."""
        return n_heads

    def forward(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Sums over values y [B,T,N,V] → [B,T,heads(N),V].

        Args:
            v: the token's own values, [B,T,K,V]; head n of y sums values of head ⌊n K/N⌋
            x: [B,T,D], which the attention reads
        """
        raise NotImplementedError
