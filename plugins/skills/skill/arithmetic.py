from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import ASK, CONTENT, MINUS, PLUS, TIMES, Question, Random, Row, Skill
from blockwright.registry import register

EXPRESSIONS = 4  # of a row


@register("skill", "arithmetic")
class Arithmetic(Skill):
    """Values of expressions in a finite field, without intermediate results: tables known, then composed in mind.

    Mano of Allen-Zhu 2025 (Physics of Language Models 4.1), arXiv 2512.17351: prefix expressions of l operations + − ×
    modulo 23, each followed by its value. There a row is one expression of a drawn length that a token announces; here
    it has four of one length, and the modulus is a setting, so that a small model learns the tables in minutes.

    Args:
        difficulty: l, operations of an expression
        modulus: of all values; prime in the paper
    """

    unit = "operations"

    def __init__(
        self, difficulty: Annotated[int, Ge(1), Le(32)] = 2, modulus: Annotated[int, Ge(2), Le(len(CONTENT))] = 7
    ) -> None:
        super().__init__(difficulty)
        self.modulus = modulus

    def length(self, difficulty: int) -> int:
        return EXPRESSIONS * (2 * difficulty + 3)

    def row(self, difficulty: int, random: Random) -> Row:
        drawn = [self._expression(difficulty, random) for _ in range(EXPRESSIONS)]
        return Row([], [Question([*expression, ASK], [CONTENT[value]]) for expression, value in drawn])

    def _expression(self, operations: int, random: Random) -> tuple[list[int], int]:
        """Symbols of a random expression, and its value."""
        if not operations:
            value = random.randint(self.modulus)
            return [CONTENT[value]], value
        operator, left = (PLUS, MINUS, TIMES)[random.randint(3)], random.randint(operations)
        (one, a), (two, b) = self._expression(left, random), self._expression(operations - 1 - left, random)
        value = {PLUS: a + b, MINUS: a - b, TIMES: a * b}[operator] % self.modulus
        return [operator, *one, *two], value

    def oracle(self, symbols: Sequence[int]) -> int:
        """With a stack, from the last symbol of the last expression to its first."""
        stack: list[int] = []
        for symbol in reversed(symbols[:-1]):
            if symbol == ASK:
                stack.pop()  # the value of the expression before
                break
            if symbol in CONTENT:
                stack.append(CONTENT.index(symbol))
                continue
            a, b = stack.pop(), stack.pop()
            stack.append((a + b if symbol == PLUS else a - b if symbol == MINUS else a * b) % self.modulus)
        return CONTENT[stack.pop()]
