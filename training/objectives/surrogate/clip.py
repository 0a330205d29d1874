from __future__ import annotations

import torch
from torch import Tensor

from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Positive, ProperFraction
from blockwright.training.objectives.ratio.base import Ratio
from blockwright.training.objectives.surrogate.base import Surrogate, SurrogateLoss


@register("surrogate", "clip")
class Clip(SurrogateLoss):
    """PPO's clipped objective: −min(ρ A, clip(ρ, 1 − low, 1 + high) A).

    Schulman et al. 2017, arXiv 1707.06347; GRPO, arXiv 2402.03300. DAPO's higher upper bound (arXiv 2503.14476) is
    ``high``. A ``ceiling`` above 1 + high bounds ρ before all else. It matters only where A < 0, where the minimum has
    no other bound: both dual clipping (arXiv 1912.09729, verl's ``clip_ratio_c``) and the two-sided clipping of
    INTELLECT-2 (arXiv 2505.07291, TRL's ``delta``).

    Args:
        ratio: of tokens, or of completions (GSPO)
        low: how far below 1 a ratio still matters
        high: how far above 1 a ratio still matters
        ceiling: largest ratio where the advantage is negative; null for none
    """

    def __init__(
        self, ratio: Ratio, low: ProperFraction = 0.2, high: Positive = 0.2, ceiling: Positive | None = None
    ) -> None:
        if ceiling is not None and ceiling <= 1 + high:
            rule = f"must be above 1 + high ({1 + high:g})"
            raise BlockError("ceiling", ceiling, rule, "Raise it, or write null for none")
        self.ratio, self.low, self.high, self.ceiling = ratio, low, high, ceiling

    def __call__(self, logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
        gain = advantage[:, None]
        ratio = self.ratio(logp, old, mask).exp()
        bounded = ratio if self.ceiling is None else ratio.clamp(max=self.ceiling)
        loss = -torch.min(bounded * gain, ratio.clamp(1 - self.low, 1 + self.high) * gain)
        return Surrogate(loss, (ratio < 1 - self.low) & (gain < 0), (ratio > 1 + self.high) & (gain > 0))
