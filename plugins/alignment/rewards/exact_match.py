from __future__ import annotations

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts, column
from blockwright.registry import register


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
