"""The contract of ``advantage``: how much better each completion of a prompt is than the others."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from blockwright.registry import Composable, family

EPSILON = 1e-4  # added to a standard deviation, as TRL does; verl adds 1e-6


@family("advantage", root="task")
class Advantage(Composable):
    """Turns rewards into advantages, without gradient. Subclasses define ``of``, of the rewards' weighted sum.

    Letters: P prompts, G completions of each, F reward functions. NaN is a reward that a function did not give: the
    others are summed. A completion without any reward gets advantage 0 and is in no baseline.
    """

    def __call__(self, rewards: Tensor, weights: Tensor) -> Tensor:
        """Advantages [P,G] of rewards [P,G,F], the functions weighted by ``weights`` [F]."""
        return self.of(total(rewards, weights)).nan_to_num(0.0)

    @abstractmethod
    def of(self, rewards: Tensor) -> Tensor:
        """Advantages of rewards [P,G]; NaN where the reward is."""


def total(rewards: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of rewards [P,G,F] over the functions, [P,G]; NaN only where all are."""
    return (rewards * weights).nansum(-1).masked_fill(rewards.isnan().all(-1), torch.nan)


def centred(rewards: Tensor) -> Tensor:
    """Rewards [P,G] less the mean of their group."""
    return rewards - rewards.nanmean(1, keepdim=True)


def deviation(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The sample standard deviation (n − 1) of the values that are not NaN; 0 for a single one. Keeps dimensions."""
    number = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (number - 1).clamp(min=1)).sqrt()
