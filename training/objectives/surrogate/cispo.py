from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.registry.ranges import Positive
from blockwright.training.objectives.ratio.base import Ratio
from blockwright.training.objectives.surrogate.base import Surrogate, SurrogateLoss


@register("surrogate", "cispo")
class CISPO(SurrogateLoss):
    """Clipped weights instead of clipped updates: −sg(min(ρ, 1 + high)) A log π, sg without gradient.

    MiniMax 2025 (MiniMax-M1), arXiv 2506.13585. Every token keeps a gradient, also those far from the sampling policy.
    As in the paper's experiments there is no lower bound, and the upper is 1 + high, where TRL's ``epsilon_high`` is
    the bound itself.

    Args:
        ratio: of tokens, or of completions
        high: how far above 1 a weight may be
    """

    def __init__(self, ratio: Ratio, high: Positive = 4.0) -> None:
        self.ratio, self.high = ratio, high

    def __call__(self, logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
        gain = advantage[:, None]
        ratio = self.ratio(logp, old, mask).detach().exp()
        loss = -ratio.clamp(max=1 + self.high) * gain * logp
        return Surrogate(loss, ratio.new_zeros(ratio.shape).bool(), (ratio > 1 + self.high) & (gain > 0))
