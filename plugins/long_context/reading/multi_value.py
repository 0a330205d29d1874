from __future__ import annotations

import numpy as np

from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, compose_prompt, reading_test
from blockwright.plugins.long_context.reading.wording import Wording


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
