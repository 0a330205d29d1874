from __future__ import annotations

from blockwright.blocks.attention.gqa import GQA
from blockwright.blocks.base import Placement
from blockwright.registry import register


@register("attention", "mqa", fixes={"n_kv_heads": 1})
class MQA(GQA):
    """Multi-query attention: all query heads share one head of keys and values.

    Shazeer 2019, arXiv 1911.02150: y = W_o [softmax(q_n kᵀ/√H) v]_n. It is ``gqa`` with one KV head. The cache holds
    2·H numbers per token.
    """

    def parallel_plan(self) -> dict[str, Placement]:
        shared = ("key.weight", "key.bias", "value.weight", "value.bias")  # one head: every rank needs it whole
        return {name: how for name, how in super().parallel_plan().items() if name not in shared}
