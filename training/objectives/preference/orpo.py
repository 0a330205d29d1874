from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.preference.base import Answers, PreferenceLoss


@register("preference", "orpo")
class ORPO(PreferenceLoss):
    """Fine-tuning on the chosen answer, and preference by the ratio of odds, in one stage without a reference.

    Hong et al. 2024, arXiv 2403.07691: −log p(chosen) − β log σ(log odds(chosen) − log odds(rejected)), where p is the
    geometric mean over an answer's tokens and odds = p / (1 − p); β is the paper's λ. The first term is that of each
    answer; TRL averages it over the tokens of a batch.
    """

    compares: ClassVar[bool] = False

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -chosen.mean - self.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean


def _log_odds(answers: Answers) -> Tensor:
    """log p − log(1 − p); an answer of probability 1 to fp32 has those of the largest number below."""
    mean = answers.mean.clamp(max=-1e-7)
    return mean - torch.log(-torch.expm1(mean))
