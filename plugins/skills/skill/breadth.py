from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.plugins.skills.skill.base import ASK, CONTENT, END, Question, Random, Row, Skill, shuffled
from blockwright.registry import register

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
