from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import (
    LOWER,
    QUESTIONS,
    UPPER,
    Random,
    Row,
    Skill,
    ask,
    drawn,
    in_turn,
    shuffled,
)
from blockwright.registry import register


@register("skill", "recall")
class Recall(Skill):
    """Values of keys that the row told: multi-query associative recall, MQAR.

    Arora et al. 2023 (Zoology), arXiv 2312.04927, section 3: k₁ v₁ … k_d v_d, then every key again, each followed by
    its value; where d is small, all again in another order, until there are 16 questions. What has to be remembered
    grows with d, so a state of fixed size fails beyond its size. The paper puts most questions soon after their pairs
    (a power law of gaps); here they follow without gaps, and two keys may have the same value.

    Args:
        difficulty: d, pairs
    """

    unit = "pairs"

    def __init__(self, difficulty: Annotated[int, Ge(1), Le(len(LOWER))] = 16) -> None:
        super().__init__(difficulty)

    def length(self, difficulty: int) -> int:
        return 2 * difficulty + 2 * max(difficulty, QUESTIONS)

    def row(self, difficulty: int, random: Random) -> Row:
        keys, values = shuffled(LOWER, difficulty, random), drawn(UPPER, difficulty, random)
        pairs = list(zip(keys, values, strict=True))
        told = [symbol for pair in pairs for symbol in pair]
        return ask(told, in_turn(pairs, QUESTIONS, random))

    def oracle(self, symbols: Sequence[int]) -> int:
        return symbols[symbols.index(symbols[-1]) + 1]
