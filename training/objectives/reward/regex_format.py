from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from registry import BlockError, register
from training.objectives.reward.base import Reward


@register("reward", "regex_format")
class RegexFormat(Reward):
    """1 for a completion that a regular expression matches as a whole, else 0.

    Args:
        pattern: in Python's grammar; ``.`` matches line ends too. One that backtracks without bound would hang the
            run
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise BlockError("pattern", pattern, f"is no regular expression ({error})", "Correct it") from None

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        return [float(self.pattern.fullmatch(text) is not None) for text in completions]
