from __future__ import annotations

import re

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Positive


@register("reward", "regex_format")
class RegexFormat(Reward):
    """1 for a completion that a regular expression matches as a whole, else 0.

    Args:
        pattern: in Python's grammar; ``.`` matches line ends too
        timeout_s: seconds for the completions of a rollout; one that backtracks without bound counts as failed
    """

    bounds = (0.0, 1.0)

    def __init__(self, pattern: str, timeout_s: Positive = 60.0) -> None:
        self.timeout_s = timeout_s
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise BlockError("pattern", pattern, f"is no regular expression ({error})", "Correct it") from None

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        return [float(self.pattern.fullmatch(text) is not None) for text in completions]
