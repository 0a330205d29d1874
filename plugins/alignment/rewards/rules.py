"""Rewards by rules: of the answer, of its form, of its length."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts, column
from blockwright.registry import BlockError, register
from blockwright.registry.extras import require
from blockwright.registry.ranges import Count, NonNegative, Positive


@register("reward", "exact_match")
class ExactMatch(Reward):
    """1 for a completion that equals a column of the data, blanks at both ends aside, else 0.

    Args:
        answer: name of the column
    """

    bounds = (0.0, 1.0)

    def __init__(self, answer: str = "answer") -> None:
        self.answer = answer

    def needs(self) -> tuple[str, ...]:
        return (self.answer,)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        answers = column(columns, self.answer, "exact_match")
        return [float(text.strip() == str(answer).strip()) for text, answer in zip(completions, answers, strict=True)]


# A minus just behind a number, a name or a bracket subtracts; elsewhere it is a sign.
NUMBER = re.compile(r"(?:(?<![\w)\]%.])[-−])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+)?")


@register("reward", "arithmetic")
class Arithmetic(Reward):
    """1 if the last number of a completion is the number in a column, else 0; thousands may have commas, as in GSM8K.

    ``12-8`` ends with 8, ``= -8`` and ``12 -8`` with −8, ``-.5`` with −0.5. None where the column holds no number, or
    one beyond the range of a float.

    Args:
        answer: name of the column
        tolerance: largest relative error
    """

    bounds = (0.0, 1.0)

    def __init__(self, answer: str = "answer", tolerance: NonNegative = 1e-6) -> None:
        self.answer, self.tolerance = answer, tolerance

    def needs(self) -> tuple[str, ...]:
        return (self.answer,)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        answers = column(columns, self.answer, "arithmetic")
        return [self._judge(_last(text), _last(str(a))) for text, a in zip(completions, answers, strict=True)]

    def _judge(self, number: float | None, answer: float | None) -> float | None:
        if answer is None:
            return None
        return float(number is not None and math.isclose(number, answer, rel_tol=self.tolerance, abs_tol=1e-12))


def _last(text: str) -> float | None:
    """The last number of a text; None without any, or for one beyond the range of a float."""
    numbers = NUMBER.findall(text)
    value = float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else math.nan
    return value if math.isfinite(value) else None


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


NAMES = ("task", "settings", "seed", "number")  # columns that name a problem


@register("reward", "reasoning_gym")
class ReasoningGymReward(Reward):
    """What the verifier of a problem of reasoning-gym gives a completion, 0 to 1, blanks at both ends aside.

    For problems of the corpus ``ReasoningGym`` (data/reasoning_gym.py), whose columns name them.
    """

    bounds = (0.0, 1.0)

    def __init__(self) -> None:
        require("alignment", "reasoning_gym", path="task.reward", value="reasoning_gym")

    def needs(self) -> tuple[str, ...]:
        return NAMES

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        named = [column(columns, name, "reasoning_gym") for name in NAMES]
        return [_score(text.strip(), *which) for text, *which in zip(completions, *named, strict=True)]


def _score(text: str, task: str, settings: dict[str, Any], seed: int, number: int) -> float:
    drawn = _problems(task, json.dumps(settings, sort_keys=True), seed)
    return float(drawn.score_answer(text, drawn[number]))


@lru_cache(maxsize=64)
def _problems(task: str, settings: str, seed: int) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, **json.loads(settings), seed=seed, size=2**31)  # drawn by number: the size is no matter
