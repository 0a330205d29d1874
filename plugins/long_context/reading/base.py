"""The contract of a reading test: it makes prompts of any text and hides the answer in them.

A test is one class in one file::

    @reading_test("needle")
    class Needle(ReadingTest): ...

Another package names the module with it as an entry point of the group ``blockwright.reading_tests``. Everything is
drawn from a seed and made offline.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from blockwright.plugins.long_context.reading.wording import Ids, Wording
from blockwright.registry import ConfigError, RegistrationError, did_you_mean

ENTRY_POINTS = "blockwright.reading_tests"
OWN = ("needle", "multi_key", "multi_query", "multi_value", "copy", "variable_tracking", "frequent_words")
Text = npt.NDArray[Any]

_tests: dict[str, type[ReadingTest]] = {}
C = TypeVar("C", bound="type[ReadingTest]")


@dataclass(frozen=True)
class Prompt:
    """A text with a question at its end, and the answers.

    Args:
        tokens: text, question and answers [T]
        start: index of the first token of the answers
        accepted: index of an answer's token → the ids that are right. Answers may come in any order, so where one
            begins, the first ids of all answers that are left are right
        answers: the answers alone, to look for in a generated text
    """

    tokens: Ids
    start: int
    accepted: dict[int, frozenset[int]]
    answers: tuple[Ids, ...]


class ReadingTest(ABC):
    """One kind of question about a long text.

    Class attributes:
        name: in ``--suite``
        has_depth: true if the caller chooses the place of the asked fact; otherwise the test has one column
    """

    name: ClassVar[str]
    has_depth: ClassVar[bool] = True

    @abstractmethod
    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """One prompt.

        Args:
            length: its tokens, answers included
            depth: place of the asked fact: 0 at the beginning, 1 before the question
            text: ids to hide facts in, at least ``length``; may be changed
            words: how facts and questions are written
            random: draws keys and values

        Raises:
            ConfigError: at ``lengths``, if the facts do not fit
        """


def reading_test(name: str) -> Callable[[C], C]:
    """Register the decorated class as a reading test.

    Raises:
        RegistrationError: another class has the name
    """

    def put(cls: C) -> C:
        old = _tests.get(name)
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RegistrationError(f"the reading test {name!r} is already {old.__module__}.{old.__qualname__}")
        cls.name = name
        _tests[name] = cls
        return cls

    return put


@cache
def _load() -> None:
    for module in OWN:
        importlib.import_module(f"{__package__}.{module}")
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        importlib.import_module(point.value)


def find(names: Sequence[str], path: str) -> list[ReadingTest]:
    """The tests of these names, with their default settings.

    Raises:
        ConfigError: at ``path``, for none, or an unknown one
    """
    _load()
    if not names:
        raise ConfigError(path, list(names), "must name at least one reading test", f"Known: {', '.join(_tests)}")
    for name in names:
        if name not in _tests:
            raise ConfigError(path, name, "there is no such reading test", did_you_mean(name, sorted(_tests)))
    return [_tests[name]() for name in names]


# --- what tests are made with -----------------------------------------------------------------------------------------


def compose_prompt(
    text: Text,
    length: int,
    facts: Sequence[Ids],
    depth: float | None,
    question: Ids,
    answers: Sequence[Ids],
    between: Ids,
    random: np.random.RandomState,
    in_order: bool = False,
) -> Prompt:
    """A text with facts in it, the question and the answers at its end.

    Args:
        text: ids, at least ``length``
        length: tokens of the result
        facts: the first stands at ``depth``, the others at random places; none overlap
        depth: None: the first stands at a random place too
        question: ids before the answers
        answers: each is asked for, in any order
        between: ids between two answers, not asked for
        random: draws the places
        in_order: whether facts at random places stand in their order

    Raises:
        ConfigError: at ``lengths``, if they do not fit
    """
    tail, asked = [*question], dict[int, frozenset[int]]()
    for i, answer in enumerate(answers):
        tail += between if i else []
        for at in range(len(answer)):
            left = [other for other in answers[i:] if other[:at] == answer[:at] and len(other) > at]
            asked[len(tail) + at] = frozenset(other[at] for other in left)
        tail += answer
    refuse_crowded(length, sum(map(len, facts)) + len(tail))
    room = length - len(tail)
    tokens = [*np.asarray(text[:room]).tolist(), *tail]
    for at, fact in zip(_places(facts, room, depth, random, in_order), facts, strict=True):
        tokens[at : at + len(fact)] = fact
    accepted = {room + index: ids for index, ids in asked.items()}
    return Prompt(tokens, room + len(question), accepted, tuple(list(answer) for answer in answers))


def refuse_crowded(length: int, needed: int) -> None:
    """Refuse a window in which facts and question would leave less than half to the text.

    Raises:
        ConfigError: at ``lengths``
    """
    if 2 * needed > length + 1:
        rule = f"is too short: facts, question and answers of the reading test are {needed} tokens, at most half of it"
        raise ConfigError("lengths", length, rule, f"Write lengths of {2 * needed} or more, or choose other suites")


def _places(
    facts: Sequence[Ids], room: int, depth: float | None, random: np.random.RandomState, in_order: bool
) -> list[int]:
    """Where facts begin in ``room`` tokens, without overlap: the gaps between them are drawn, not the places."""
    order = list(range(len(facts))) if in_order else random.permutation(len(facts)).tolist()
    if depth is not None and facts:
        return _around(facts, room, depth, random)
    gaps = np.sort(random.randint(0, room - sum(map(len, facts)) + 1, size=len(facts)))
    places, before = [0] * len(facts), 0
    for gap, fact in zip(gaps.tolist(), order, strict=True):
        places[fact] = gap + before
        before += len(facts[fact])
    return places


def _around(facts: Sequence[Ids], room: int, depth: float, random: np.random.RandomState) -> list[int]:
    """The first fact at its depth, the others at random places before and after it."""
    size = len(facts[0])
    at = round(depth * (room - size))
    left: list[int] = []
    right: list[int] = []
    for i in random.permutation(np.arange(1, len(facts))).tolist():
        spare = [at - sum(len(facts[j]) for j in left), room - at - size - sum(len(facts[j]) for j in right)]
        chances = np.maximum(np.array(spare) - len(facts[i]) + 1, 0)
        (left if random.randint(chances.sum()) < chances[0] else right).append(i)
    places = [at] * len(facts)
    for side, start, end in ((left, 0, at), (right, at + size, room)):
        inner = _places([facts[i] for i in side], end - start, None, random, in_order=True)
        for i, place in zip(side, inner, strict=True):
            places[i] = start + place
    return places


def windows(text: Text, length: int, random: np.random.RandomState) -> Iterator[Text]:
    """Pieces of a text from random places, without end; a shorter text is repeated."""
    while True:
        first = random.randint(len(text))
        yield np.asarray(text[(first + np.arange(length)) % len(text)], dtype=np.int64)
