from __future__ import annotations

from blocks.attention.gqa import GQA
from blocks.position.base import Position
from registry import register


@register("attention", "mqa")
class MQA(GQA):
    """Multi-query attention: all query heads share one head of keys and values.

    Shazeer 2019, arXiv 1911.02150: y = W_o [softmax(q_n kᵀ/√H) v]_n. It is ``gqa`` with one KV head. The cache keeps
    2·H numbers a token.

    Args:
        n_heads: N, query heads
        head_dim: H, width of a head; null is d_model / n_heads
        bias: whether the four projections add a bias
        position: turns queries and keys, or shifts scores
    """

    def __init__(
        self, d_model: int, position: Position, n_heads: int = 8, head_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__(d_model, position, n_heads, 1, head_dim, bias)
