from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import LOWER, UPPER, Question, Random, Row, Skill, drawn, shuffled
from blockwright.registry import register
from blockwright.registry.ranges import Count

MOST = 256


@register("skill", "overwriting")
class Overwriting(Skill):
    """The last value of keys whose values change: what was true before has to be forgotten.

    After the forgetting MQAR of Zoology (arXiv 2312.04927; zoology/data/forgetting_mqar.py): every key gets a value,
    then keys get new ones, then each is asked for its last. There a key changes once at most; here d changes fall on
    random keys, so that a key may change many times, and a model that adds up all values, without erasing, fails.

    Args:
        difficulty: d, changes
        keys: different keys
    """

    unit = "changes"

    def __init__(
        self, difficulty: Annotated[int, Ge(1), Le(MOST)] = 16, keys: Annotated[Count, Le(len(LOWER))] = 8
    ) -> None:
        super().__init__(difficulty)
        self.keys = keys

    def length(self, difficulty: int) -> int:
        return 4 * self.keys + 2 * difficulty

    def row(self, difficulty: int, random: Random) -> Row:
        keys = shuffled(LOWER, self.keys, random)
        written = [*keys, *drawn(keys, difficulty, random)]
        values = drawn(UPPER, len(written), random)
        last = dict(zip(written, values, strict=True))
        told = [symbol for pair in zip(written, values, strict=True) for symbol in pair]
        return Row(told, [Question([key], [last[key]]) for key in shuffled(keys, self.keys, random)])

    def oracle(self, symbols: Sequence[int]) -> int:
        key = symbols[-1]
        return next(symbols[i + 1] for i in reversed(range(len(symbols) - 1)) if symbols[i] == key)
