"""Skills of several steps: links followed, numbers added, lists that are read and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import (
    ASK,
    CONTENT,
    END,
    LOWER,
    MINUS,
    PLUS,
    TIMES,
    UPPER,
    Question,
    Random,
    Row,
    Skill,
    drawn,
    shuffled,
)
from blockwright.registry import register
from blockwright.registry.errors import BlockError


@register("skill", "depth")
class Depth(Skill):
    """The k-th successor of a node, in one step of thought: how deep a model reasons without writing.

    Depo of Allen-Zhu 2025 (Physics of Language Models 4.1), arXiv 2512.17351: the edges x₁ y₁ … x_n y_n of a directed
    permutation, then questions k q with answers that are k steps from q. As there, the permutation is a cycle and its
    edges are in random order. There a node is one or two tokens, n is up to 75 to 225, and k is drawn for each
    question; here a node is one symbol and the questions of a row have one k, so that the difficulty is that of a row.
    They ask for half of the nodes, each once: no two have the same answer, so the last of all would be what is left.

    Args:
        difficulty: k, steps; less than ``nodes``
        nodes: n, of the cycle
    """

    unit = "hops"

    def __init__(
        self,
        difficulty: Annotated[int, Ge(1), Le(len(UPPER) - 1)] = 4,
        nodes: Annotated[int, Ge(2), Le(len(LOWER))] = 8,
    ) -> None:
        super().__init__(difficulty)
        self.nodes = nodes
        if difficulty >= nodes:
            rule = f"goes around the cycle (nodes = {nodes})"
            raise BlockError("difficulty", difficulty, rule, f"Write at most {nodes - 1}, or raise nodes")

    def length(self, difficulty: int) -> int:
        return 2 * self.nodes + 3 * (self.nodes // 2)

    def row(self, difficulty: int, random: Random) -> Row:
        cycle = shuffled(LOWER, self.nodes, random)
        told = [node for i in random.permutation(self.nodes) for node in (cycle[i], cycle[(i + 1) % self.nodes])]
        asked = random.permutation(self.nodes)[: self.nodes // 2]
        successors = [(cycle[i], cycle[(i + difficulty) % self.nodes]) for i in asked]
        return Row(told, [Question([UPPER[difficulty], node], [successor]) for node, successor in successors])

    def oracle(self, symbols: Sequence[int]) -> int:
        edges = next(i for i, symbol in enumerate(symbols) if symbol in UPPER)
        successor = {symbols[i]: symbols[i + 1] for i in range(0, edges, 2)}
        node = symbols[-1]
        for _ in range(UPPER.index(symbols[-2])):
            node = successor[node]
        return node


PARENTS = 2  # of a node, at most


@register("skill", "breadth")
class Breadth(Skill):
    """All nodes that can be reached from one, in topological order: many branches in mind before the first is written.

    Brevo of Allen-Zhu 2025 (Physics of Language Models 4.1), arXiv 2512.17351: edges x₁ y₁ … x_m y_m of a directed
    graph without cycles, ``ask q``, then what q reaches, sorted, and an end. There any topological order is right;
    here one is, so that targets are unique: of the nodes all of whose reached parents are written, the one that is
    named first in the row comes next.

    Args:
        difficulty: n, nodes of the graph; each but the first has one or two parents
    """

    unit = "nodes"
    least = 2

    def __init__(self, difficulty: Annotated[int, Ge(2), Le(32)] = 8) -> None:
        super().__init__(difficulty)

    def length(self, difficulty: int) -> int:
        return 2 * PARENTS * (difficulty - 1) + 2 + difficulty

    def row(self, difficulty: int, random: Random) -> Row:
        nodes = shuffled(CONTENT, difficulty, random)
        parents = [[], *(sorted(set(random.randint(i, size=PARENTS).tolist())) for i in range(1, difficulty))]
        edges = [(parent, child) for child, above in enumerate(parents) for parent in above]
        edges = [edges[i] for i in random.permutation(len(edges))]
        asked = edges[random.randint(len(edges))][0]
        told = [nodes[node] for edge in edges for node in edge]
        answer = [nodes[node] for node in _sorted(asked, parents, [node for edge in edges for node in edge])]
        return Row(told, [Question([ASK, nodes[asked]], [*answer, END])])

    def oracle(self, symbols: Sequence[int]) -> int:
        at = symbols.index(ASK)
        edges = {(symbols[i], symbols[i + 1]) for i in range(0, at, 2)}
        reached = {symbols[at + 1]}
        while more := {y for x, y in edges if x in reached} - reached:
            reached |= more
        written = symbols[at + 1 :]
        left = reached - set(written)
        ready = [y for y in left if not any(x in left for x, child in edges if child == y)]
        return min(ready, key=symbols.index, default=END)


def _sorted(asked: int, parents: Sequence[Sequence[int]], named: Sequence[int]) -> list[int]:
    """The nodes below the asked one, parents first, else by where they are named.

    A node's parents have lower numbers than it has.
    """
    below = {asked}
    for node, above in enumerate(parents):
        if below & set(above):
            below.add(node)
    order: list[int] = []
    waiting = sorted(below - {asked}, key=named.index)
    while waiting:
        ready = next(node for node in waiting if not set(parents[node]) & set(waiting))
        waiting.remove(ready)
        order.append(ready)
    return order


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


KEYS, BETWEEN, VALUES = CONTENT[:21], CONTENT[21:42], CONTENT[42:]


@register("skill", "stacked")
class Stacked(Skill):
    """The value of the value of a key: two recalls, of which the second needs the result of the first.

    MQAR (arXiv 2312.04927) stacked twice: a table k → m, then a table m → v, each in an order of its own, then keys
    are asked for their v. The value between is never written after the question, so two layers have to look up one
    after the other. Half of the keys are asked for, each once: the last of all would have the one value that is left.

    Args:
        difficulty: d, pairs of each table
    """

    unit = "pairs"

    def __init__(self, difficulty: Annotated[int, Ge(1), Le(len(KEYS))] = 8) -> None:
        super().__init__(difficulty)

    def length(self, difficulty: int) -> int:
        return 4 * difficulty + 2 * math.ceil(difficulty / 2)

    def row(self, difficulty: int, random: Random) -> Row:
        keys, between = shuffled(KEYS, difficulty, random), shuffled(BETWEEN, difficulty, random)
        values = drawn(VALUES, difficulty, random)
        second = [(between[i], values[i]) for i in random.permutation(difficulty)]
        told = [symbol for pair in [*zip(keys, between, strict=True), *second] for symbol in pair]
        return Row(
            told,
            [Question([keys[i]], [values[i]]) for i in random.permutation(difficulty)[: math.ceil(difficulty / 2)]],
        )

    def oracle(self, symbols: Sequence[int]) -> int:
        between = symbols[symbols.index(symbols[-1]) + 1]
        second = [i for i, symbol in enumerate(symbols) if symbol == between][1]
        return symbols[second + 1]
