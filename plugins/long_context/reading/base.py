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

from blockwright.registry import ConfigError, RegistrationError, did_you_mean
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

ENTRY_POINTS = "blockwright.reading_tests"
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
    importlib.import_module(f"{__package__}.suite")  # which imports this module
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
    # Refuse a window in which facts and question would leave less than half to the text.
    needed = sum(map(len, facts)) + len(tail)
    if 2 * needed > length + 1:
        rule = f"is too short: facts, question and answers of the reading test are {needed} tokens, at most half of it"
        raise ConfigError("lengths", length, rule, f"Write lengths of {2 * needed} or more, or choose other suites")
    room = length - len(tail)
    tokens = [*np.asarray(text[:room]).tolist(), *tail]
    for at, fact in zip(_places(facts, room, depth, random, in_order), facts, strict=True):
        tokens[at : at + len(fact)] = fact
    accepted = {room + index: ids for index, ids in asked.items()}
    return Prompt(tokens, room + len(question), accepted, tuple(list(answer) for answer in answers))


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


# --- how the facts and questions of reading tests are written: as bare symbols, or as sentences -----------------------


Ids = list[int]
Word = Any  # a name or a value: of one wording only


class Wording(ABC):
    """Draws names and values, and writes facts about them."""

    @abstractmethod
    def name(self, random: np.random.RandomState) -> Word:
        """A new name: of a key or a variable."""

    @abstractmethod
    def value(self, random: np.random.RandomState) -> Word:
        """A new value."""

    @abstractmethod
    def fact(self, key: Word, value: Word) -> Ids:
        """State that a key has a value."""

    @abstractmethod
    def ask(self, key: Word, number: int) -> Ids:
        """Ask for ``number`` values of a key; the first answer follows."""

    @abstractmethod
    def assign(self, name: Word, source: Word, is_value: bool) -> Ids:
        """Assign a variable a value, or the value of another variable."""

    @abstractmethod
    def ask_variables(self, value: Word, number: int) -> Ids:
        """Ask for the variables that have a value."""

    @abstractmethod
    def listed(self, word: Word) -> Ids:
        """A word of a list of words."""

    @abstractmethod
    def ask_frequent(self, number: int) -> Ids:
        """Ask for the most frequent words."""

    @abstractmethod
    def answer(self, word: Word) -> Ids:
        """A word as an answer."""

    @abstractmethod
    def between(self, key: Word | None) -> Ids:
        """Separate two answers to a question about ``key``; None if the question names no key."""


class Symbols(Wording):
    """Names and values are strings of random ids, without words: for models that follow no instructions.

    A fact is the value after the name, a question the name again: what induction continues. An assignment is the new
    name after its source, so that a chain of variables is followed from the value on.

    Args:
        first, end: the ids are from ``first`` up to, without, ``end``
        name_length: ids of a name
        value_length: ids of a value
    """

    def __init__(self, first: int = 128, end: int = 256, name_length: int = 3, value_length: int = 5) -> None:
        self.first, self.end, self.name_length, self.value_length = first, end, name_length, value_length

    def _string(self, length: int, random: np.random.RandomState) -> Ids:
        return [int(i) for i in random.randint(self.first, self.end, size=length)]

    def name(self, random: np.random.RandomState) -> Ids:
        return self._string(self.name_length, random)

    def value(self, random: np.random.RandomState) -> Ids:
        return self._string(self.value_length, random)

    def fact(self, key: Word, value: Word) -> Ids:
        return [*key, *value]

    def ask(self, key: Word, number: int) -> Ids:
        return list(key)

    def assign(self, name: Word, source: Word, is_value: bool) -> Ids:
        return [*source, *name]

    def ask_variables(self, value: Word, number: int) -> Ids:
        return list(value)

    def listed(self, word: Word) -> Ids:
        return list(word)

    def ask_frequent(self, number: int) -> Ids:
        return []

    def answer(self, word: Word) -> Ids:
        return list(word)

    def between(self, key: Word | None) -> Ids:
        return [] if key is None else list(key)


class Sentences(Wording):
    """RULER's sentences (Hsieh et al. 2024, arXiv 2404.06654), in a tokenizer's ids, for models that read text.

    Keys are numbered words and values are numbers of seven digits, where RULER draws keys from a list of nouns.

    Args:
        tokenizer: of the model
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def _ids(self, text: str) -> Ids:
        return [int(i) for i in self.tokenizer.encode(text)]

    def name(self, random: np.random.RandomState) -> str:
        return "".join(chr(97 + i) for i in random.randint(0, 26, size=6))

    def value(self, random: np.random.RandomState) -> str:
        return str(random.randint(1_000_000, 10_000_000))

    def fact(self, key: Word, value: Word) -> Ids:
        return self._ids(f" One of the special magic numbers for {key} is: {value}. ")

    def ask(self, key: Word, number: int) -> Ids:
        what = "number" if number == 1 else "numbers"
        verb = "is" if number == 1 else "are"
        return self._ids(
            f" What {verb} the special magic {what} for {key} mentioned in the provided text? "
            f"The special magic {what} for {key} mentioned in the provided text {verb}"
        )

    def assign(self, name: Word, source: Word, is_value: bool) -> Ids:
        return self._ids(f" VAR {name} = {source if is_value else f'VAR {source}'} ")

    def ask_variables(self, value: Word, number: int) -> Ids:
        return self._ids(
            f" Question: Find all variables that are assigned the value {value} in the text above. Answer: "
            f"According to the chain(s) of variable assignment in the text above, {number} variables are assigned the "
            f"value {value}, they are:"
        )

    def listed(self, word: Word) -> Ids:
        return self._ids(f" {word}")

    def ask_frequent(self, number: int) -> Ids:
        return self._ids(
            f" Question: What are the {number} most frequently appeared words in the above coded text? Answer: "
            f"According to the coded text above, the {number} most frequently appeared words are:"
        )

    def answer(self, word: Word) -> Ids:
        return self._ids(f" {word}")

    def between(self, key: Word | None) -> Ids:
        return self._ids(",")


WORDINGS = ("symbols", "sentences")


def wording_of(name: str, symbols: Sequence[int], tokenizer: Tokenizer, at: Callable[[str], str]) -> Wording:
    """A wording by its name.

    Args:
        name: one of ``WORDINGS``
        symbols: first id, and the one after the last
        tokenizer: of the model
        at: setting → its path, for messages

    Raises:
        ConfigError: an unknown name, or symbols that are no ids
    """
    if name not in WORDINGS:
        raise ConfigError(at("wording"), name, "there is no such wording", did_you_mean(name, WORDINGS))
    if name == "sentences":
        return Sentences(tokenizer)
    if len(symbols) != 2 or not 0 <= symbols[0] < symbols[1] - 1 or symbols[1] > tokenizer.vocab_size:
        rule = f"must be the first id and the one after the last, of the {tokenizer.vocab_size} of the tokenizer"
        raise ConfigError(at("symbols"), list(symbols), rule, f"Write e.g. [0,{tokenizer.vocab_size}]")
    return Symbols(int(symbols[0]), int(symbols[1]))
