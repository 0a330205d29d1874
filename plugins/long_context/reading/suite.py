"""Reading tests: needles among other text, the words that occur most, variables that are given on."""

from __future__ import annotations

from itertools import cycle, islice, pairwise

import numpy as np

from blockwright.plugins.long_context.reading.base import (
    Prompt,
    ReadingTest,
    Text,
    Wording,
    compose_prompt,
    reading_test,
)
from blockwright.registry import ConfigError


@reading_test("needle")
class Needle(ReadingTest):
    """One fact in a long text: the needle in a haystack (Kamradt 2023; RULER's ``niah_single``)."""

    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """The value of a key that stands at ``depth``."""
        key, value = words.name(random), words.value(random)
        facts, question = [words.fact(key, value)], words.ask(key, 1)
        return compose_prompt(text, length, facts, depth, question, [words.answer(value)], [], random)


@reading_test("multi_key")
class MultiKey(ReadingTest):
    """One fact among others about other keys (RULER's ``niah_multikey``), of which only the asked one is right.

    Args:
        keys: facts in the text, the asked one included; 4 in RULER's first variant
    """

    def __init__(self, keys: int = 4) -> None:
        self.keys = keys

    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """The value of the key that stands at ``depth``."""
        pairs = [(words.name(random), words.value(random)) for _ in range(self.keys)]
        facts, (key, value) = [words.fact(*pair) for pair in pairs], pairs[0]
        return compose_prompt(text, length, facts, depth, words.ask(key, 1), [words.answer(value)], [], random)


@reading_test("multi_value")
class MultiValue(ReadingTest):
    """Several facts about one key (RULER's ``niah_multivalue``): all values are asked for, in any order.

    Args:
        values: of the key; 4 in RULER
    """

    def __init__(self, values: int = 3) -> None:
        self.values = values

    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """All values of a key, of which the first stands at ``depth``."""
        key, values = words.name(random), [words.value(random) for _ in range(self.values)]
        facts, answers = [words.fact(key, v) for v in values], [words.answer(v) for v in values]
        question = words.ask(key, self.values)
        return compose_prompt(text, length, facts, depth, question, answers, words.between(key), random)


@reading_test("multi_query")
class MultiQuery(ReadingTest):
    """Several facts, all asked for one after the other: multi-query associative recall (Arora et al. 2023, arXiv
    2312.04927; RULER's ``niah_multiquery``, which asks for all in one sentence).

    Each question stands after the true answer to the one before. Of generated texts the first answer counts.

    Args:
        keys: facts in the text; 4 in RULER
    """

    def __init__(self, keys: int = 4) -> None:
        self.keys = keys

    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """The values of all keys, in another order than their facts, of which the first stands at ``depth``."""
        pairs = [(words.name(random), words.value(random)) for _ in range(self.keys)]
        tail, asked = [], dict[int, frozenset[int]]()
        for which in random.permutation(self.keys).tolist():
            key, value = pairs[which]
            tail += words.ask(key, 1)
            answer = words.answer(value)
            asked |= {len(tail) + at: frozenset([token]) for at, token in enumerate(answer)}
            tail += answer
        facts = [words.fact(*pair) for pair in pairs]
        tokens = compose_prompt(text, length, facts, depth, tail, [], [], random).tokens
        before = length - len(tail)
        first = before + min(asked)
        end = next(i for i in range(min(asked), len(tail) + 1) if i not in asked)
        return Prompt(tokens, first, {before + at: ids for at, ids in asked.items()}, (tokens[first : before + end],))


@reading_test("copy")
class Copy(ReadingTest):
    """A passage of random values that begins again at the end, to be repeated (Jelassi et al. 2024, arXiv 2402.01032).

    A state of fixed size forgets a passage that is longer than it can hold, where attention copies any.

    Args:
        values: of the passage; all but the first are asked for
    """

    def __init__(self, values: int = 6) -> None:
        self.values = values

    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """All but the first value of a passage that stands at ``depth``."""
        values = [words.listed(words.value(random)) for _ in range(self.values)]
        passage, rest = [i for value in values for i in value], [i for value in values[1:] for i in value]
        return compose_prompt(text, length, [passage], depth, values[0], [rest], [], random)


DRAWS = 1000  # of a list, until no word is as frequent as the last that is asked for


@reading_test("frequent_words")
class FrequentWords(ReadingTest):
    """The most frequent words of a list (RULER's ``fwe``): the whole text counts, no place of it.

    The frequency of the word of rank r is as r^−``power`` (a zeta distribution), and the text is nothing but words.

    Args:
        words: different ones
        asked: how many of the most frequent; 3 in RULER
        power: of the distribution; 2 in RULER
    """

    has_depth = False

    def __init__(self, words: int = 50, asked: int = 3, power: float = 2.0) -> None:
        self.words, self.asked, self.power = words, asked, power

    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """The most frequent words, in any order."""
        names = [words.name(random) for _ in range(self.words)]
        shares = np.arange(1.0, self.words + 1) ** -self.power
        written, answers = [words.listed(name) for name in names], [words.answer(name) for name in names]
        question, between = words.ask_frequent(self.asked), words.between(None)
        room = length - len(question) - self.asked * max(map(len, answers)) - (self.asked - 1) * len(between)
        for _ in range(DRAWS):
            drawn = random.choice(self.words, size=length // min(map(len, written)) + 1, p=shares / shares.sum())
            shown = drawn[np.cumsum([len(written[word]) for word in drawn.tolist()]) <= room]
            # By what is shown, not by rank: in a short text a rarer word may be more frequent.
            counts = np.bincount(shown, minlength=self.words)
            most = np.argsort(-counts, kind="stable").tolist()
            if counts[most[self.asked - 1]] > counts[most[self.asked]]:
                break
        else:
            rule = f"is too short for {self.asked} words that are more frequent than all others"
            raise ConfigError("lengths", length, rule, "Write longer ones, or choose other suites")
        listed = [i for word in shown.tolist() for i in written[word]]
        fill = islice(cycle(written[most[0]]), length)  # where answers are short: it stays the most frequent
        asked = [answers[word] for word in most[: self.asked]]
        return compose_prompt(np.array([*listed, *fill]), length, [], None, question, asked, between, random)


@reading_test("variable_tracking")
class VariableTracking(ReadingTest):
    """A chain of assignments (RULER's ``vt``): which variables have, directly or not, a given value.

    The assignments stand in order, as in RULER, at random places.

    Args:
        hops: assignments after the first; 4 in RULER
    """

    has_depth = False

    def __init__(self, hops: int = 2) -> None:
        self.hops = hops

    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """The names of all variables of a chain."""
        value, names = words.value(random), [words.name(random) for _ in range(self.hops + 1)]
        facts = [words.assign(names[0], value, True), *(words.assign(b, a, False) for a, b in pairwise(names))]
        question, answers = words.ask_variables(value, len(names)), [words.answer(name) for name in names]
        return compose_prompt(text, length, facts, None, question, answers, words.between(None), random, in_order=True)
