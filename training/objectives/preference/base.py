"""The contract of ``preference``: a loss that prefers one answer to another."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from blockwright.registry import Composable, family
from blockwright.registry.ranges import Positive


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of one answer of each of P pairs.

    Args:
        logp: under the policy, summed over the scored tokens [P], with its gradient
        tokens: number of scored tokens [P]
        reference: under the reference policy [P]; None for losses that do not compare with one
    """

    logp: Tensor
    tokens: Tensor
    reference: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Log-probability a token [P]."""
        return self.logp / self.tokens

    @property
    def ratio(self) -> Tensor:
        """log π/π_ref [P]."""
        assert self.reference is not None
        return self.logp - self.reference


@family("preference", root="task")
class PreferenceLoss(Composable):
    """The loss of each pair, and the reward of an answer that the policy implies.

    Args:
        beta: factor on log-ratios: small for a policy that may move far from the reference

    Class attributes:
        compares: whether log-probabilities under a reference policy are needed
    """

    compares: ClassVar[bool] = True

    def __init__(self, beta: Positive = 0.1) -> None:
        self.beta = beta

    @abstractmethod
    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        """The loss of each pair [P]."""

    def reward(self, answers: Answers) -> Tensor:
        """The implied reward of each answer [P], which is logged."""
        return self.beta * answers.ratio

    def margin(self, chosen: Answers, rejected: Answers) -> Tensor:
        """How much higher the implied reward of the chosen answer is [P]."""
        return self.reward(chosen) - self.reward(rejected)


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(margin) − ε log σ(−margin) [P]."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
