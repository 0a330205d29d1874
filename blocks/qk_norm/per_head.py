from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.norm.base import Norm
from blockwright.blocks.qk_norm.base import QKNorm
from blockwright.registry import register


@register("qk_norm", "per_head")
class PerHead(QKNorm):
    """Each head separately, with gains shared by all heads.

    Qwen3, arXiv 2505.09388; Gemma-3: q_n ← norm(q_n), k_g ← norm(k_g), over the H numbers of a head.

    Args:
        q_norm: norm of queries
        k_norm: norm of keys, in an attention that makes them
    """

    def __init__(self, n_kv_heads: int, q_norm: Norm, k_norm: Norm) -> None:
        super().__init__()
        self.q_norm, self.k_norm = q_norm, k_norm if n_kv_heads else None

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["head_dim"]}

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
