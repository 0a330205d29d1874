from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.penalty.base import Penalty, k3


@register("penalty", "weighted_k3")
class WeightedK3(Penalty):
    """k3 times the ratio π/π_old, with the ratio's gradient: DeepSeek-V3.2's unbiased estimate.

    DeepSeek-AI 2025, arXiv 2512.02556, §3.1: the expected gradient is that of KL(π ‖ reference) also off policy, and
    stays bounded for tokens that the policy finds far less likely than the reference does.

    Args:
        beta: weight of the estimate
    """

    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        return (logp - old).exp() * k3(logp, reference)
