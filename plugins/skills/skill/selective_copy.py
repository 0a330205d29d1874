from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import ASK, BLANK, CONTENT, Question, Random, Row, Skill, drawn
from blockwright.registry import register

MOST = 256


@register("skill", "selective_copy")
class SelectiveCopy(Skill):
    """Symbols scattered among blanks, to be repeated in their order.

    Poli et al. 2024 (MAD), arXiv 2403.17844, appendix A, selective copying: what is noise has to be left out, and the
    i-th symbol found by counting, not by its place. There the symbols to copy are 16 of 256 places; here half of the
    places are blank.

    Args:
        difficulty: d, symbols to copy
    """

    unit = "symbols"

    def __init__(self, difficulty: Annotated[int, Ge(1), Le(MOST)] = 16) -> None:
        super().__init__(difficulty)

    def length(self, difficulty: int) -> int:
        return 3 * difficulty + 1

    def row(self, difficulty: int, random: Random) -> Row:
        copied, told = drawn(CONTENT, difficulty, random), [BLANK] * (2 * difficulty)
        for place, symbol in zip(sorted(random.permutation(len(told))[:difficulty]), copied, strict=True):
            told[place] = symbol
        return Row(told, [Question([ASK], copied)])

    def oracle(self, symbols: Sequence[int]) -> int:
        end = symbols.index(ASK)
        return [symbol for symbol in symbols[:end] if symbol != BLANK][len(symbols) - end - 1]
