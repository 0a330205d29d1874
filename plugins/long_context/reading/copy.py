from __future__ import annotations

import numpy as np

from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, compose_prompt, reading_test
from blockwright.plugins.long_context.reading.wording import Wording


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
