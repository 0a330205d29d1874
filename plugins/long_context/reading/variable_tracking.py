from __future__ import annotations

from itertools import pairwise

import numpy as np

from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, compose_prompt, reading_test
from blockwright.plugins.long_context.reading.wording import Wording


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
