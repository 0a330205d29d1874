"""Rewards that are made of other rewards."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Number


@register("reward", "weighted")
class Weighted(Reward):
    """The weighted sum of rewards, each of which is logged; DeepSeek-V2's eq. 35 (arXiv 2405.04434).

    A reward that is None is left out of the sum; it is None only where all are. A completion of which a part fails has
    no reward.

    Args:
        rewards: nodes of rewards
        weights: factor of each
    """

    def __init__(self, rewards: list[Reward], weights: list[Number]) -> None:
        if len(rewards) != len(weights) or not rewards:
            rule = f"there must be one for each of the {len(rewards)} rewards, and at least one"
            raise BlockError("weights", weights, rule, "Write as many weights as rewards")
        self.rewards, self.weights = rewards, weights
        self.timeout_s = sum(reward.timeout_s for reward in rewards)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        each = [reward(prompts, completions, **columns) for reward in self.rewards]
        return [self._sum(values) for values in zip(*each, strict=True)]

    def _sum(self, values: Sequence[float | None]) -> float | None:
        """The weighted sum of one completion's rewards that are not None; None without any."""
        terms = [weight * value for weight, value in zip(self.weights, values, strict=True) if value is not None]
        return sum(terms) if terms else None

    def needs(self) -> tuple[str, ...]:
        return tuple(name for reward in self.rewards for name in reward.needs())

    def parts(self) -> dict[str, tuple[float, Reward]]:
        parts: dict[str, tuple[float, Reward]] = {}
        for weight, reward in zip(self.weights, self.rewards, strict=True):
            for name, (inner, part) in reward.parts().items():
                parts[name if name not in parts else f"{name}_{len(parts)}"] = (weight * inner, part)
        return parts


@register("reward", "levelled")
class Levelled(Reward):
    """A control: each completion gets the mean reward of its batch, so no group has spread, and nothing is learned.

    The mean of a batch is unchanged, so on held-out prompts it is still that of ``reward``.

    Args:
        reward: that is averaged; its values of None are left out, and one that failed stays failed
    """

    together = True

    def __init__(self, reward: Reward) -> None:
        self.reward, self.timeout_s, self.bounds = reward, reward.timeout_s, reward.bounds

    def needs(self) -> tuple[str, ...]:
        return self.reward.needs()

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        values = self.reward(prompts, completions, **columns)
        failed = [value is not None and math.isnan(value) for value in values]
        known = [value for value, fails in zip(values, failed, strict=True) if value is not None and not fails]
        mean = sum(known) / len(known) if known else None
        return [math.nan if fails else mean for fails in failed]


@register("reward", "shuffled")
class Shuffled(Reward):
    """A control: each completion gets the reward of another of its batch, so there is nothing to learn.

    The mean of a batch is unchanged, so on held-out prompts it is still that of ``reward``. The order is a function of
    the completions alone.

    Args:
        reward: that is given to others
    """

    together = True

    def __init__(self, reward: Reward) -> None:
        self.reward, self.timeout_s, self.bounds = reward, reward.timeout_s, reward.bounds

    def needs(self) -> tuple[str, ...]:
        return self.reward.needs()

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        values = list(self.reward(prompts, completions, **columns))
        random.Random("\n".join((*prompts, *completions))).shuffle(values)
        return values
