from __future__ import annotations

import random

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts
from blockwright.registry import register


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
