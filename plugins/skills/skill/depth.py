from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import LOWER, UPPER, Question, Random, Row, Skill, shuffled
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
