"""Skills of remembering: what was said once, and what was said last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import (
    ASK,
    BLANK,
    CONTENT,
    LOWER,
    UPPER,
    Ints,
    Question,
    Random,
    Row,
    Skill,
    drawn,
    random_state,
    shuffled,
)
from blockwright.registry import register
from blockwright.registry.ranges import Count


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
