from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import CONTENT, Ints, Question, Random, Row, Skill, random_state
from blockwright.registry import register

NAMES = len(CONTENT) ** 2  # of two symbols
FACTS_A_ROW = 16  # at most: each is asked for once
WORLD = 20_251  # seed of the facts, which are the same for all runs


@register("skill", "knowledge")
class Knowledge(Skill):
    """Facts that no row tells: a name of two symbols, then its value, to be known from training.

    Capo of Allen-Zhu 2025 (Physics of Language Models 4.1), arXiv 2512.17351, after the capacity laws of Allen-Zhu & Li
    2024, arXiv 2404.05405: a model of P parameters holds at most so many bits of facts. There facts are attributes in
    biographies of several wordings; here a fact is 6 bits, the value that a fixed random table gives a name. So d facts
    are 6 d bits, and those that a model holds are d · max(0, 6 − loss in bits).

    Args:
        difficulty: d, facts
    """

    unit = "facts"

    def __init__(self, difficulty: Annotated[int, Ge(1), Le(NAMES)] = 256) -> None:
        super().__init__(difficulty)

    def length(self, difficulty: int) -> int:
        return 3 * min(difficulty, FACTS_A_ROW)

    def bits(self, difficulty: int) -> float:
        return difficulty * math.log2(len(CONTENT))

    def row(self, difficulty: int, random: Random) -> Row:
        facts = _facts()[random.permutation(difficulty)[:FACTS_A_ROW]].tolist()
        named = [[CONTENT[i] for i in fact] for fact in facts]
        return Row([], [Question(fact[:2], fact[2:]) for fact in named])

    def oracle(self, symbols: Sequence[int]) -> int:
        """By going through the table of all facts, which a model has to learn."""
        name = [CONTENT.index(symbol) for symbol in symbols[-2:]]
        return next(CONTENT[value] for first, second, value in _facts().tolist() if [first, second] == name)


@cache
def _facts() -> Ints:
    """Both symbols of a name and its value, in the order in which they become part of harder questions [names, 3]."""
    random = random_state(WORLD)
    names = random.permutation(NAMES)
    return np.stack([names // len(CONTENT), names % len(CONTENT), random.randint(len(CONTENT), size=NAMES)], axis=1)
