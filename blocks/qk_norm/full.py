from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.norm.base import Norm
from blockwright.blocks.qk_norm.base import QKNorm
from blockwright.registry import register


@register("qk_norm", "full")
class Full(QKNorm):
    """One norm over all heads together, with a gain per element.

    OLMoE, arXiv 2409.02060; OLMo-2, arXiv 2501.00656: q ← norm(q) over N·H numbers, k ← norm(k) over K·H.

    Args:
        q_norm: norm of queries
        k_norm: norm of keys, in an attention that makes them
    """

    def __init__(self, n_kv_heads: int, q_norm: Norm, k_norm: Norm) -> None:
        super().__init__()
        self.q_norm, self.k_norm = q_norm, k_norm if n_kv_heads else None

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["head_dim"] * known["n_heads" if child == "q_norm" else "n_kv_heads"]}

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.q_norm(q.flatten(-2)).view_as(q)
        return normed, k if self.k_norm is None else self.k_norm(k.flatten(-2)).view_as(k)
