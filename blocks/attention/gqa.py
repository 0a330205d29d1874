from __future__ import annotations

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.registry import register


@register("attention", "gqa", fixes={"window": None})
class GQA(GroupedAttention):
    """Grouped-query attention: several query heads share one head of keys and values.

    Ainslie et al. 2023, arXiv 2305.13245: q_n = W_q,n x, k_g = W_k,g x, v_g = W_v,g x with g = ⌊n K/N⌋;
    y = W_o [softmax(q_n k_gᵀ/√H) v_g]_n. Query, key and value projections are three matrices, as in Llama's
    checkpoints; GPT-2 stores them as one. The cache holds 2·K·H numbers per token.
    """
