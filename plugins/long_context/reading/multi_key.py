from __future__ import annotations

import numpy as np

from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, compose_prompt, reading_test
from blockwright.plugins.long_context.reading.wording import Wording


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
