from __future__ import annotations

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts, column
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count


@register("reward", "length")
class Length(Reward):
    """A soft punishment of long completions, from 0 down to −1.

    Yu et al. 2025 (DAPO), arXiv 2503.14476, eq. 13: 0 up to longest − buffer tokens, then (longest − buffer − |o|) /
    buffer, −1 above ``longest``. The paper has 20,480 and 4,096.

    Args:
        longest: tokens of the longest completion that is not fully punished
        buffer: tokens over which the punishment grows
    """

    bounds = (-1.0, 0.0)

    def __init__(self, longest: Count, buffer: Count) -> None:
        if buffer > longest:
            raise BlockError("buffer", buffer, f"must not exceed longest ({longest})", "Lower it")
        self.longest, self.buffer = longest, buffer

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        free = self.longest - self.buffer
        return [max(-1.0, min(0.0, (free - n) / self.buffer)) for n in column(columns, "n_tokens", "length")]
