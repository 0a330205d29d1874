from __future__ import annotations

import math

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts
from blockwright.registry import register


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
