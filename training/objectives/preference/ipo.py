from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.preference.base import Answers, PreferenceLoss


@register("preference", "ipo")
class IPO(PreferenceLoss):
    """Identity preference optimisation: the difference of log-ratios is drawn to a target, not to infinity.

    Azar et al. 2023, arXiv 2310.12036, eq. 17: (Δ − 1/(2β))², with β for the paper's τ. Log-ratios are means over
    tokens, as the authors corrected and TRL does; the paper has sums.
    """

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        difference = self.margin(chosen, rejected) / self.beta
        return (difference - 1 / (2 * self.beta)).square()

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.ratio / answers.tokens
