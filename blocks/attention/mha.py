from __future__ import annotations

from blockwright.blocks.attention.gqa import GQA
from blockwright.registry import SameAs, register


@register("attention", "mha", fixes={"n_kv_heads": SameAs("n_heads")})
class MHA(GQA):
    """Multi-head attention: every head has its own queries, keys and values.

    Vaswani et al. 2017, arXiv 1706.03762: y = W_o [softmax(q_n k_nᵀ/√H) v_n]_n. It is ``gqa`` with as many KV heads as
    query heads. The cache holds 2·N·H numbers per token.
    """
