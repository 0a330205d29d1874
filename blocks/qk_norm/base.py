"""The contract of ``qk_norm``: normalise queries and keys before rotation. A child of attention."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.registry import family


@family("qk_norm", context=("n_heads", "n_kv_heads", "head_dim"))
class QKNorm(Block):
    """Keeps scores bounded however large the projections grow (Henry et al. 2020, arXiv 2010.04245)."""

    def drawn(self) -> Drawn:
        return Drawn(acts="queries, keys")

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B,T,N,H] and keys [B,T,K,H] → the same shapes.

        K is 0, in the context too, where an attention borrows its keys.
        """
        raise NotImplementedError
