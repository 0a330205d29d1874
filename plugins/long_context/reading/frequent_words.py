from __future__ import annotations

import numpy as np

from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, compose_prompt, reading_test
from blockwright.plugins.long_context.reading.wording import Wording


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
        written = [words.listed(name) for name in names]
        count = length // min(map(len, written)) + 1
        drawn = random.choice(self.words, size=count, p=shares / shares.sum())
        listed = [i for word in drawn.tolist() for i in written[word]][:length]
        # By what was drawn, not by rank: in a short text a rarer word may be more frequent.
        most = np.argsort(-np.bincount(drawn, minlength=self.words), kind="stable")[: self.asked]
        answers = [words.answer(names[i]) for i in most.tolist()]
        question = words.ask_frequent(self.asked)
        return compose_prompt(np.array(listed), length, [], None, question, answers, words.between(None), random)
