"""Advantages of policy optimisation: how much better each completion of a prompt is than the others of its group.

Letters: P prompts, G completions of each, F reward functions. A reward is NaN where a function gives none: the others
are summed. A completion without any reward has advantage 0, and counts in no mean or deviation.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from blockwright.registry import Composable, family, register

EPSILON = 1e-4  # added to a standard deviation, as TRL does; verl adds 1e-6


@family("advantage", root="task")
class Advantage(Composable):
    """Turns rewards into advantages, without gradient. Subclasses define ``of``, of the rewards' weighted sum."""

    def __init__(self) -> None: ...

    def __call__(self, rewards: Tensor, weights: Tensor) -> Tensor:
        """Advantages [P,G] of rewards [P,G,F], the functions weighted by ``weights`` [F]."""
        return self.of(total(rewards, weights)).nan_to_num(0.0)

    @abstractmethod
    def of(self, rewards: Tensor) -> Tensor:
        """Advantages of rewards [P,G]; NaN where the reward is."""


@register("advantage", "group")
class Group(Advantage):
    """Reward less the group's mean, divided by the group's standard deviation.

    Shao et al. 2024 (DeepSeekMath, GRPO), arXiv 2402.03300: A_i = (r_i − mean r) / std r. The deviation is the sample's
    (n − 1) plus 1e-4, as in TRL. A group whose rewards are all equal has advantage 0.
    """

    def of(self, rewards: Tensor) -> Tensor:
        return centred(rewards) / (deviation(rewards, 1) + EPSILON)


@register("advantage", "batch")
class Batch(Advantage):
    """Reward less the group's mean, divided by the standard deviation of all rewards of the rollout.

    TRL's ``scale_rewards=batch``: A_i = (r_i − mean of its group) / (std of all + 1e-4), the sample's deviation.
    """

    def of(self, rewards: Tensor) -> Tensor:
        return centred(rewards) / (deviation(rewards, (0, 1)) + EPSILON)


@register("advantage", "centred")
class Centred(Advantage):
    """Reward less the group's mean.

    Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783, and DeepSeek-V3.2, arXiv 2512.02556: A_i = r_i − mean r. Dividing by
    the deviation gives prompts that are almost always or almost never solved a larger weight; this does not.
    """

    def of(self, rewards: Tensor) -> Tensor:
        return centred(rewards)


@register("advantage", "rloo")
class RLOO(Advantage):
    """Reward less the mean of the group's other rewards.

    Ahmadian et al. 2024 (REINFORCE leave-one-out), arXiv 2402.14740: A_i = r_i − mean of r_j, j ≠ i, which is n / (n −
    1) times the reward less the mean of all n. A group with one reward has advantage 0.
    """

    def of(self, rewards: Tensor) -> Tensor:
        number = (~rewards.isnan()).sum(1, keepdim=True)
        return centred(rewards) * number / (number - 1).clamp(min=1)


@register("advantage", "gdpo")
class GDPO(Advantage):
    """Every reward function normalised within the group, then their weighted sum over the batch.

    GDPO, TRL's ``multi_objective_aggregation=normalize_then_sum``: a function with small rewards counts as much as its
    weight says, where the sum of rewards would hide it. Both deviations are the sample's, plus 1e-4.
    """

    def __call__(self, rewards: Tensor, weights: Tensor) -> Tensor:
        each = torch.stack([centred(r) / (deviation(r, 1) + EPSILON) for r in rewards.unbind(-1)], -1)
        return super().__call__(each, weights)

    def of(self, rewards: Tensor) -> Tensor:
        return (rewards - rewards.nanmean()) / (deviation(rewards, (0, 1)) + EPSILON)


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
