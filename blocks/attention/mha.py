from __future__ import annotations

from blocks.attention.gqa import GQA
from blocks.position.base import Position
from registry import register


@register("attention", "mha")
class MHA(GQA):
    """Multi-head attention: every head has its own queries, keys and values.

    Vaswani et al. 2017, arXiv 1706.03762: y = W_o [softmax(q_n k_nᵀ/√H) v_n]_n. It is ``gqa`` with as many KV heads as
    query heads. The cache keeps 2·N·H numbers a token.

    Args:
        n_heads: N, heads
        head_dim: H, width of a head; null is d_model / n_heads
        bias: whether the four projections add a bias (GPT-2 does)
        position: turns queries and keys, or shifts scores
    """

    def __init__(
        self, d_model: int, position: Position, n_heads: int = 8, head_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__(d_model, position, n_heads, n_heads, head_dim, bias)
