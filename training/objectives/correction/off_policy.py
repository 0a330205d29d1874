from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.registry.ranges import Positive
from blockwright.training.objectives.correction.base import Correction


@register("correction", "off_policy")
class OffPolicy(Correction):
    """Drops a completion with a negative advantage that the policy has moved far away from.

    DeepSeek-AI 2025 (DeepSeek-V3.2), arXiv 2512.02556, §3.1: factor 0 where A < 0 and mean_t log(sampler/π) > delta,
    else 1. The paper does not give delta; 0.5 is TRL's suggestion.

    Args:
        delta: mean log-ratio, in nats per token, above which it is dropped
    """

    def __init__(self, delta: Positive = 0.5) -> None:
        self.delta = delta

    def __call__(self, logp: Tensor, old: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        mean = ((sampler - logp.detach()) * mask).sum(1) / mask.sum(1).clamp(min=1)
        kept = ~((advantage < 0) & (mean > self.delta))
        return kept[:, None].to(logp.dtype).expand_as(logp)
