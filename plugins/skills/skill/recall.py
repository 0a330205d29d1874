from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import LOWER, UPPER, Question, Random, Row, Skill, drawn, shuffled
from blockwright.registry import register


@register("skill", "recall")
class Recall(Skill):
    """Values of keys that the row told: multi-query associative recall, MQAR.

    Arora et al. 2023 (Zoology), arXiv 2312.04927, section 3: k₁ v₁ … k_d v_d, then every key again, in another
    order, each followed by its value. What has to be remembered grows with d, so a state of fixed size fails beyond its
    size. The paper puts most questions soon after their pairs (a power law of gaps); here they follow without gaps, and
    two keys may have the same value.

    Args:
        difficulty: d, pairs
    """

    unit = "pairs"

    def __init__(self, difficulty: Annotated[int, Ge(1), Le(len(LOWER))] = 16) -> None:
        super().__init__(difficulty)

    def length(self, difficulty: int) -> int:
        return 4 * difficulty

    def row(self, difficulty: int, random: Random) -> Row:
        keys, values = shuffled(LOWER, difficulty, random), drawn(UPPER, difficulty, random)
        told = [symbol for pair in zip(keys, values, strict=True) for symbol in pair]
        return Row(told, [Question([keys[i]], [values[i]]) for i in random.permutation(difficulty)])

    def oracle(self, symbols: Sequence[int]) -> int:
        return symbols[symbols.index(symbols[-1]) + 1]
