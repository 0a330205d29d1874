from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.experts.base import Experts
from blockwright.blocks.gating.base import Routing
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count


@register("experts", "with_identity")
class WithIdentity(Experts):
    """Experts of which the last few return their input, so that a token may choose to compute less.

    LongCat-Flash, arXiv 2509.01322 ("zero-computation experts"): y = Σ_{i chosen, i < E − Z} g_i expert_i(x) +
    Σ_{i chosen, i ≥ E − Z} g_i x. The gate sees E experts; the inner block holds the E − Z that compute.

    Args:
        experts: those that compute
        n_idle: Z, experts without parameters; 256 of 768 in LongCat-Flash
    """

    def __init__(self, experts: Experts, n_experts: int, n_idle: Count = 1) -> None:
        super().__init__()
        _check(n_experts, n_idle)
        self.experts, self.n_computing = experts, n_experts - n_idle

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        _check(known["n_experts"], known["n_idle"])
        return {"n_experts": known["n_experts"] - known["n_idle"]}

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        E, idle = self.n_computing, routing.experts >= self.n_computing
        experts, weights = routing.experts.clamp(max=E), routing.weights.masked_fill(idle, 0.0)
        inner = Routing(experts, weights, routing.probs[:, :E], {}, routing.load[:E], experts.numel())
        weights = routing.weights.to(torch.promote_types(x.dtype, torch.float32)) * idle
        return self.passed(x, weights.sum(-1, keepdim=True), self.experts(x, inner))

    def passed(self, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        """Outputs y [T,D] of the computing experts, and the idle ones' total weight [T,1] → [T,D]."""
        return y + x * weight.to(x.dtype)


def _check(n_experts: int, n_idle: int) -> None:
    if n_idle >= n_experts:
        raise BlockError("n_idle", n_idle, f"must leave some of the {n_experts} experts", "Lower it, or add experts")
