from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.registry.ranges import Positive
from blockwright.training.objectives.preference.base import Answers, PreferenceLoss, smoothed
from blockwright.training.objectives.preference.sigmoid import Smoothing


@register("preference", "robust")
class Robust(PreferenceLoss):
    """DPO's loss without the bias that wrong preferences bring.

    Chowdhury et al. 2024 (rDPO), arXiv 2403.00409: (−(1 − ε) log σ(β Δ) + ε log σ(−β Δ)) / (1 − 2 ε), whose expectation
    over labels flipped with probability ε is the loss of true ones.

    Args:
        beta: factor on log-ratios
        label_smoothing: ε, the assumed share of pairs whose preference is wrong
    """

    def __init__(self, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> None:
        super().__init__(beta)
        self.label_smoothing = label_smoothing

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        share, margin = self.label_smoothing, self.margin(chosen, rejected)
        return ((1 - share) * smoothed(margin, 0.0) - share * smoothed(-margin, 0.0)) / (1 - 2 * share)
