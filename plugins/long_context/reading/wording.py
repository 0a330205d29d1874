"""How the facts and questions of reading tests are written: as bare symbols, or as sentences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blockwright.registry import ConfigError, did_you_mean
from blockwright.training.data.tokenizers.base import Tokenizer

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
