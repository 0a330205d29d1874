from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.registry.ranges import Positive
from blockwright.training.objectives.correction.base import Correction, Level, importance


@register("correction", "truncate")
class Truncate(Correction):
    """Truncated importance sampling: min(π_old/sampler, cap).

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Args:
        level: ``token``; or ``sequence`` for the product over the completion
        cap: largest factor
    """

    def __init__(self, level: Level = "token", cap: Positive = 2.0) -> None:
        self.level, self.cap = level, cap

    def __call__(self, logp: Tensor, old: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return importance(old, sampler, mask, self.level).clamp(max=self.cap)
