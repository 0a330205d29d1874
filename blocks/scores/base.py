"""The contract of ``scores``: how the scores of an attention become weights, where a plain softmax will not do."""

from __future__ import annotations

from torch import Tensor

from blocks.base import Block
from registry import family


@family("scores", context=("n_heads",))
class Scores(Block):
    """A child of attention that takes the place of ``blocks.kernels.attention.causal_attention``."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        bias: Tensor | None = None,
        segments: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Queries [B,T,N,H], keys [B,S,K,H], values [B,S,K,V] → [B,T,N,V]; arguments as in ``causal_attention``."""
        raise NotImplementedError
