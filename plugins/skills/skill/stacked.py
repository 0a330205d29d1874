from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import CONTENT, Question, Random, Row, Skill, drawn, shuffled
from blockwright.registry import register

KEYS, BETWEEN, VALUES = CONTENT[:21], CONTENT[21:42], CONTENT[42:]


@register("skill", "stacked")
class Stacked(Skill):
    """The value of the value of a key: two recalls, of which the second needs the result of the first.

    MQAR (arXiv 2312.04927) stacked twice: a table k → m, then a table m → v, each in an order of its own, then keys
    are asked for their v. The value between is never written after the question, so two layers have to look up one
    after the other. Half of the keys are asked for, each once: the last of all would have the one value that is left.

    Args:
        difficulty: d, pairs of each table
    """

    unit = "pairs"

    def __init__(self, difficulty: Annotated[int, Ge(1), Le(len(KEYS))] = 8) -> None:
        super().__init__(difficulty)

    def length(self, difficulty: int) -> int:
        return 4 * difficulty + 2 * math.ceil(difficulty / 2)

    def row(self, difficulty: int, random: Random) -> Row:
        keys, between = shuffled(KEYS, difficulty, random), shuffled(BETWEEN, difficulty, random)
        values = drawn(VALUES, difficulty, random)
        second = [(between[i], values[i]) for i in random.permutation(difficulty)]
        told = [symbol for pair in [*zip(keys, between, strict=True), *second] for symbol in pair]
        return Row(
            told,
            [Question([keys[i]], [values[i]]) for i in random.permutation(difficulty)[: math.ceil(difficulty / 2)]],
        )

    def oracle(self, symbols: Sequence[int]) -> int:
        between = symbols[symbols.index(symbols[-1]) + 1]
        second = [i for i, symbol in enumerate(symbols) if symbol == between][1]
        return symbols[second + 1]
