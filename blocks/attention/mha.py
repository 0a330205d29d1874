from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocks.attention.gqa import GQA
from blocks.output_gate.base import OutputGate
from blocks.position.base import Position
from blocks.qk_norm.base import QKNorm
from blocks.scores.base import Scores
from registry import register
from registry.ranges import Count, Positive


@register("attention", "mha")
class MHA(GQA):
    """Multi-head attention: every head has its own queries, keys and values.

    Vaswani et al. 2017, arXiv 1706.03762: y = W_o [softmax(q_n k_nᵀ/√H) v_n]_n. It is ``gqa`` with as many KV heads as
    query heads. The cache keeps 2·N·H numbers a token.

    Args:
        n_heads: N, heads
        head_dim: H, width of a head; null is d_model / n_heads
        bias: whether the projections of queries, keys and values add a bias
        output_bias: whether the output projection adds one; null as ``bias``
        query_scale: what scores are divided by the root of; null is head_dim
        position: turns queries and keys, or shifts scores
        qk_norm: normalises queries and keys before they are turned; null for none
        output_gate: weighs what the heads found; null for none
        scores: what takes the place of the plain softmax; null for none
    """

    def __init__(
        self,
        d_model: int,
        position: Position,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        query_scale: Positive | None = None,
        qk_norm: QKNorm | None = None,
        output_gate: OutputGate | None = None,
        scores: Scores | None = None,
    ) -> None:
        super().__init__(
            d_model, position, n_heads, n_heads, head_dim, bias, output_bias, query_scale, qk_norm, output_gate, scores
        )

    @classmethod
    def kv_heads(cls, known: Mapping[str, Any]) -> int:
        return known["n_heads"]
