from __future__ import annotations

import numpy as np

from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, compose_prompt, reading_test
from blockwright.plugins.long_context.reading.wording import Wording


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
