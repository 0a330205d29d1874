"""The contract of ``skill``: questions of one kind, made without end, of which the difficulty is one number.

A row tells something, then asks questions, each followed by its answer. An answer follows from the symbols before it:
``oracle`` finds it. Answers are scored, each where its question is asked first: later in the row it could be copied.
Symbols are small numbers and no text; the data module gives each a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from blockwright.registry import Composable, family

BLANK, ASK, END, PLUS, MINUS, TIMES = range(6)
CONTENT = range(10, 74)  # what keys, values, nodes and numbers are drawn from
LOWER, UPPER = CONTENT[:32], CONTENT[32:]  # two halves that cannot be confused
MARKS = range(74, 94)  # of the skills of one run, by their places: what a row begins with
SYMBOLS = MARKS.stop
LEVELS = 5  # difficulties of a skill that is trained and measured
GUESSED = 1000  # rows that chance is measured on, and the floor on a quarter

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Random = np.random.RandomState


class Question(NamedTuple):
    """Symbols that ask, and those that answer them.

    Args:
        asked: with the same told before, they have one answer
        answer: right after them
    """

    asked: Sequence[int]
    answer: Sequence[int]


class Row(NamedTuple):
    """What a row tells, then its questions."""

    told: Sequence[int]
    questions: Sequence[Question]

    @property
    def symbols(self) -> list[int]:
        """All of them, in order."""
        return [*self.told, *(symbol for asked, answer in self.questions for symbol in (*asked, *answer))]

    @property
    def scored(self) -> list[int]:
        """The places of answers, without those to a question that the row has answered before."""
        places: list[int] = []
        before: set[tuple[int, ...]] = set()
        at = len(self.told)
        for asked, answer in self.questions:
            at += len(asked) + len(answer)
            if tuple(asked) not in before:
                places += range(at - len(answer), at)
            before.add(tuple(asked))
        return places


@dataclass(frozen=True)
class Questions:
    """Rows of one difficulty, filled with ``BLANK`` to its length.

    Args:
        symbols: [n, L]
        scored: whether a symbol is an answer [n, L]
    """

    symbols: Ints
    scored: Bools


@family("skill", root="data")
class Skill(Composable):
    """Questions that need one skill.

    Registered as ``@register("skill", NAME)`` it is chosen by ``data.skill=[NAME]``. Its constructor takes
    ``difficulty`` with its bounds, the hardest that a run trains on. All rows are functions of the random state alone.

    Args:
        difficulty: of the hardest questions, in ``unit``

    Class attributes:
        unit: what the difficulty counts, such as ``pairs``
        least: the easiest difficulty
    """

    unit: ClassVar[str]
    least: ClassVar[int] = 1

    def __init__(self, difficulty: int) -> None:
        self.difficulty = difficulty

    # --- defined by subclasses ------------------------------------------------------------------------------------

    @abstractmethod
    def length(self, difficulty: int) -> int:
        """L, the most symbols that a row of this difficulty has."""

    @abstractmethod
    def row(self, difficulty: int, random: Random) -> Row:
        """One row, its answers included."""

    @abstractmethod
    def oracle(self, symbols: Sequence[int]) -> int:
        """The answer that follows a row's first symbols, found from them alone, slowly and plainly.

        It shares no code with ``row``.
        """

    def bits(self, difficulty: int) -> float | None:
        """Bits that weights have to hold to answer all questions; None if the rows hold all that is asked."""
        return None

    # --- the same for all -----------------------------------------------------------------------------------------

    @property
    def levels(self) -> list[int]:
        """Difficulties that are trained and measured: the hardest, its half, its quarter, … ascending."""
        return sorted({max(self.least, self.difficulty >> i) for i in range(LEVELS)})

    def generate(self, seed: int, difficulty: int, n: int) -> Questions:
        """n rows, the same for a seed whatever the platform."""
        random = random_state(seed, difficulty)
        rows = [self.row(difficulty, random) for _ in range(n)]
        symbols = np.full((n, self.length(difficulty)), BLANK, dtype=np.int64)
        scored = np.zeros(symbols.shape, dtype=bool)
        for i, row in enumerate(rows):
            symbols[i, : len(row.symbols)] = row.symbols
            scored[i, row.scored] = True
        return Questions(symbols, scored)

    def chance(self, difficulty: int, seed: int = 0) -> float:
        """The share of answers that one guesses right who knows the last symbol alone, as a model without attention.

        Measured: the likeliest answer after each symbol in half of the rows, tried on the other half.
        """
        asked = self.generate(seed, difficulty, GUESSED)
        last, answers = asked.symbols[:, :-1][asked.scored[:, 1:]], asked.symbols[:, 1:][asked.scored[:, 1:]]
        half = len(last) // 2
        counts = np.zeros((SYMBOLS, SYMBOLS), dtype=np.int64)
        np.add.at(counts, (last[:half], answers[:half]), 1)
        return float((counts.argmax(axis=1)[last[half:]] == answers[half:]).mean())

    def floor(self, difficulty: int, seed: int = 0) -> float:
        """The share of answers that one gets right who answers with a symbol of the row, and has not the skill.

        Computed: of the answers that the row tells, without the symbols of the question, one that occurs most often,
        each answer before counted off; where the row tells none, one of all answers of the skill.
        """
        random = random_state(seed, difficulty)
        rows = [self.row(difficulty, random) for _ in range(GUESSED // 4)]
        possible = {symbol for row in rows for _, answer in row.questions for symbol in answer}
        right, answers = 0.0, 0
        for told, questions in rows:
            left = Counter(symbol for symbol in told if symbol in possible)
            for asked, answer in questions:
                for symbol in answer:
                    known = {value: n for value, n in left.items() if value not in asked} or dict.fromkeys(possible, 1)
                    most = max(known.values())
                    guesses = [value for value, n in known.items() if n == most]
                    right += (symbol in guesses) / len(guesses)
                    answers += 1
                    if symbol in left:
                        left[symbol] -= 1
        return right / answers


def random_state(*key: int) -> Random:
    """Draws that are a function of the key alone: the streams of RandomState never change."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def name_of(skill: Skill) -> str:
    """The name that a skill is registered under."""
    return str(type(skill).Config.name)  # type: ignore[attr-defined]


def shuffled(items: Sequence[int], n: int, random: Random) -> list[int]:
    """n different items in a random order."""
    return [items[i] for i in random.permutation(len(items))[:n]]


def drawn(items: Sequence[int], n: int, random: Random) -> list[int]:
    """n items, each drawn from all."""
    return [items[i] for i in random.randint(len(items), size=n)]
