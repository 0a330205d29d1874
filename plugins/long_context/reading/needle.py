from __future__ import annotations

import numpy as np

from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, compose_prompt, reading_test
from blockwright.plugins.long_context.reading.wording import Wording


@reading_test("needle")
class Needle(ReadingTest):
    """One fact in a long text: the needle in a haystack (Kamradt 2023; RULER's ``niah_single``)."""

    def prompt(self, length: int, depth: float, text: Text, words: Wording, random: np.random.RandomState) -> Prompt:
        """The value of a key that stands at ``depth``."""
        key, value = words.name(random), words.value(random)
        facts, question = [words.fact(key, value)], words.ask(key, 1)
        return compose_prompt(text, length, facts, depth, question, [words.answer(value)], [], random)
