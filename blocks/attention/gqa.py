from __future__ import annotations

from typing import ClassVar

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.base import Drawn, Placement
from blockwright.registry import SameAs, register


@register("attention", "gqa", fixes={"window": None})
class GQA(GroupedAttention):
    """Grouped-query attention: several query heads share one head of keys and values.

    Ainslie et al. 2023, arXiv 2305.13245: q_n = W_q,n x, k_g = W_k,g x, v_g = W_v,g x with g = ⌊n K/N⌋;
    y = W_o [softmax(q_n k_gᵀ/√H) v_g]_n. Query, key and value projections are three matrices, as in Llama's
    checkpoints; GPT-2 stores them as one. The cache holds 2·K·H numbers per token.
    """


@register("attention", "mha", fixes={"n_kv_heads": SameAs("n_heads")})
class MHA(GQA):
    """Multi-head attention: every head has its own queries, keys and values.

    Vaswani et al. 2017, arXiv 1706.03762: y = W_o [softmax(q_n k_nᵀ/√H) v_n]_n. It is ``gqa`` with as many KV heads as
    query heads. The cache holds 2·N·H numbers per token.
    """


@register("attention", "mqa", fixes={"n_kv_heads": 1})
class MQA(GQA):
    """Multi-query attention: all query heads share one head of keys and values.

    Shazeer 2019, arXiv 1911.02150: y = W_o [softmax(q_n kᵀ/√H) v]_n. It is ``gqa`` with one KV head. The cache holds
    2·H numbers per token.
    """

    def parallel_plan(self) -> dict[str, Placement]:
        shared = ("key.weight", "key.bias", "value.weight", "value.bias")  # one head: every rank needs it whole
        return {name: how for name, how in super().parallel_plan().items() if name not in shared}


@register("attention", "sliding_window", fixes={"selector": None})
class SlidingWindow(GroupedAttention):
    """Grouped-query attention that sees only the last ``window`` tokens.

    Beltagy et al. 2020 (Longformer), arXiv 2004.05150; Mistral 7B, arXiv 2310.06825: ``gqa`` in which token t sees
    t − window + 1 … t. Stacked layers see further: each passes on what the one below saw.

    For a model that alternates window and full attention (Gemma-2, gpt-oss), use this block everywhere with a variant
    ``{window: null}`` for the full layers. The window counts tokens of the sequence, as in transformers; in packed
    sequences it also ends at the document's start. The cache is a ring of the last ``window`` tokens.
    """

    def drawn(self) -> Drawn:
        of = super().drawn()
        return of if self.window is not None else of._replace(lines=(*(of.lines or ()), "no window"))


@register("attention", "keys_as_values", fixes={"window": None, "value_bias": None})
class KeysAsValues(GroupedAttention):
    """Grouped-query attention with one projection for keys and values.

    Gemma 4's full layers (``attention_k_eq_v``): v_g = W_k,g x, and k_g = norm(v_g), rotated; the rest is ``gqa``. The
    cache holds both, 2·K·H numbers per token, since only keys are rotated. ``grouped_tied`` rotates a part beside, and
    caches once.
    """

    projects_values: ClassVar[bool] = False
