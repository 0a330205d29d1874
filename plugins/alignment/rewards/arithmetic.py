from __future__ import annotations

import math
import re

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts, column
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative

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
