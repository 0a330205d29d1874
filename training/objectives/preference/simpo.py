from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from blockwright.registry import register
from blockwright.registry.ranges import NonNegative, Positive
from blockwright.training.objectives.preference.base import Answers, PreferenceLoss


@register("preference", "simpo")
class SimPO(PreferenceLoss):
    """Preference without a reference, by log-probabilities a token.

    Meng et al. 2024, arXiv 2405.14734: −log σ(β (mean log π(chosen) − mean log π(rejected)) − γ). The paper has β from
    2 to 10 and γ/β from 0.3 to 1.6.

    Args:
        beta: factor on mean log-probabilities
        gamma: the margin wanted
    """

    compares: ClassVar[bool] = False

    def __init__(self, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> None:
        super().__init__(beta)
        self.gamma = gamma

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -F.logsigmoid(self.margin(chosen, rejected) - self.gamma)

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean
