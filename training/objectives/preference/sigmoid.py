from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor

from blockwright.registry import register
from blockwright.registry.ranges import Positive
from blockwright.training.objectives.preference.base import Answers, PreferenceLoss, smoothed

Smoothing = Annotated[float, Ge(0), Lt(0.5)]


@register("preference", "sigmoid")
class Sigmoid(PreferenceLoss):
    """Direct preference optimisation.

    Rafailov et al. 2023 (DPO), arXiv 2305.18290: −log σ(β Δ), Δ = log π(chosen)/π_ref(chosen) − log
    π(rejected)/π_ref(rejected), over whole answers. With label smoothing ε it is the conservative loss of the same
    authors (cDPO): −(1 − ε) log σ(β Δ) − ε log σ(−β Δ).

    Args:
        beta: factor on log-ratios
        label_smoothing: ε, the assumed share of pairs whose preference is wrong
    """

    def __init__(self, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(beta)
        self.label_smoothing = label_smoothing

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return smoothed(self.margin(chosen, rejected), self.label_smoothing)
