"""The contract of ``qk_norm``: normalise queries and keys before rotation. A child of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.norm import Norm
from blockwright.registry import family, register


@family("qk_norm", context=("n_heads", "n_kv_heads", "head_dim"))
class QKNorm(Block):
    """Keeps scores bounded however large the projections grow (Henry et al. 2020, arXiv 2010.04245)."""

    def drawn(self) -> Drawn:
        return Drawn(acts="queries, keys")

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B,T,N,H] and keys [B,T,K,H] → the same shapes.

        K is 0, in the context too, where an attention borrows its keys.
        """
        raise NotImplementedError


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
