from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating, highest
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("gating", "normed_softmax")
class NormedSoftmax(LinearGating):
    """A softmax gate that reads tokens through a norm of its own, and scales each expert.

    Gemma 4 (Google 2026), as in transformers: z = W norm(x) / √D; g_i = s_i exp(z_i) / Σ_{j chosen} exp(z_j) for the k
    highest z_i, with a learned number s_i of each expert, which starts at 1. The norm's gain belongs to the router, so
    that the block around it may read the residual stream as it is. Balance losses use a softmax over all experts.

    Args:
        norm: of what the router reads
        top_k: k, experts per token
        balance: balance losses, one or a list; null for none
    """

    def __init__(
        self, d_model: int, n_experts: int, norm: Norm, top_k: Count = 2, balance: list[Balance] | None = None
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        self.norm = norm
        self.gain = nn.Parameter(torch.empty(n_experts))

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**super().child_context(child, known), "dim": known["d_model"]}

    def read(self, x: Tensor) -> Tensor:
        return self.norm(at_least_fp32(x)) * x.shape[-1] ** -0.5

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.softmax(-1)
        weights, experts = highest(probs, self.top_k, experts)
        weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights * self.gain.to(weights.dtype)[experts], probs
