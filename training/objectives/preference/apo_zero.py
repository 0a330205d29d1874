from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.preference.base import Answers, PreferenceLoss


@register("preference", "apo_zero")
class APOZero(PreferenceLoss):
    """Raises the chosen answer and lowers the rejected one, each against the reference.

    D'Oosterlinck et al. 2024, arXiv 2408.06266: 1 − σ(β log-ratio of chosen) + σ(β log-ratio of rejected). DPO's loss
    may lower both; use this where the chosen answers are better than those of the model.
    """

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return 1 - self.reward(chosen).sigmoid() + self.reward(rejected).sigmoid()
