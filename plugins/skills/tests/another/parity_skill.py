"""A skill of a package's own."""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright import register
from blockwright.plugins.skills.skill.base import ASK, CONTENT, Question, Random, Row, Skill


@register("skill", "parity")
class Parity(Skill):
    """Whether the number of ones is odd: a state that every symbol changes, and none of them tells."""

    unit = "bits"

    def __init__(self, difficulty: Annotated[int, Ge(1), Le(62)] = 8) -> None:
        super().__init__(difficulty)

    def length(self, difficulty: int) -> int:
        return difficulty + 2

    def row(self, difficulty: int, random: Random) -> Row:
        bits = random.randint(2, size=difficulty)
        return Row([], [Question([*(CONTENT[bit] for bit in bits), ASK], [CONTENT[bits.sum() % 2]])])

    def oracle(self, symbols: Sequence[int]) -> int:
        return CONTENT[symbols.count(CONTENT[1]) % 2]
