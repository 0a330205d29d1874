from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.registry.ranges import Positive
from blockwright.training.objectives.correction.base import Correction, Level, importance


@register("correction", "mask")
class Mask(Correction):
    """Importance sampling that drops what is too far off: π_old/sampler, or 0 above ``cap``.

    TRL's default for vLLM (``sequence_mask``, cap 3).

    Args:
        level: ``token``; or ``sequence`` for the product over the completion
        cap: largest factor
    """

    def __init__(self, level: Level = "sequence", cap: Positive = 3.0) -> None:
        self.level, self.cap = level, cap

    def __call__(self, logp: Tensor, old: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        factor = importance(old, sampler, mask, self.level)
        return factor.masked_fill(factor > self.cap, 0.0)
