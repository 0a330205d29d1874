from __future__ import annotations

from blocks.attention.gqa import GQA
from blocks.output_gate.base import OutputGate
from blocks.position.base import Position
from blocks.qk_norm.base import QKNorm
from blocks.scores.base import Scores
from registry import register
from registry.ranges import Count, Positive


@register("attention", "sliding_window")
class SlidingWindow(GQA):
    """Grouped-query attention that sees only the last ``window`` tokens.

    Beltagy et al. 2020 (Longformer), arXiv 2004.05150; Mistral 7B, arXiv 2310.06825: ``gqa`` in which token t sees
    t − window + 1 … t. Stacked layers see further: each hands on what the one below saw.

    A model that alternates window and full attention (Gemma-2, gpt-oss) has this block everywhere, with a variant
    ``{window: null}`` for the full layers. The window counts tokens of the sequence, as in transformers; in packed
    sequences it is cut at the document's start besides. The cache is a ring of the last ``window`` tokens.

    Args:
        n_heads: N, query heads
        n_kv_heads: K, heads of keys and values; divides n_heads
        window: tokens a query sees, itself included; null for all
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
        n_kv_heads: Count = 2,
        window: Count | None = 4096,
        head_dim: Count | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        query_scale: Positive | None = None,
        qk_norm: QKNorm | None = None,
        output_gate: OutputGate | None = None,
        scores: Scores | None = None,
    ) -> None:
        super().__init__(
            d_model,
            position,
            n_heads,
            n_kv_heads,
            head_dim,
            bias,
            output_bias,
            query_scale,
            qk_norm,
            output_gate,
            scores,
        )
        self.window = window
