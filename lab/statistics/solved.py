"""Tasks that a seed either solves or not: shares of seeds that solved them, compared exactly.

The figure of a recall task has two peaks, solved and not, so that means and t-tests of it say little. A pair of runs of
one seed is no more alike there than any two runs, so that the seeds are not paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blockwright.lab.statistics.intervals import LEVEL


@dataclass(frozen=True)
class Share:
    """Seeds that solved the task.

    Args:
        solved, n: of n seeds
        low, high: exact interval at 95 % (Clopper and Pearson 1934, doi 10.1093/biomet/26.4.404)
    """

    solved: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.solved / self.n


@dataclass(frozen=True)
class Solved:
    """Two arms on a task.

    Args:
        ours, theirs: shares
        p: two-sided, of Boschloo's exact test (1970, doi 10.1111/j.1467-9574.1970.tb00104.x) that both are alike
    """

    ours: Share
    theirs: Share
    p: float


def share(outcomes: Mapping[int, bool]) -> Share:
    """Seed → whether it solved the task; at least one seed."""
    from scipy.stats import binomtest

    solved, n = sum(outcomes.values()), len(outcomes)
    ends = binomtest(solved, n).proportion_ci(LEVEL, method="exact")
    return Share(solved, n, float(ends.low), float(ends.high))


def compare(ours: Mapping[int, bool], theirs: Mapping[int, bool]) -> Solved | None:
    """None if an arm has no seed."""
    from scipy.stats import boschloo_exact

    if not ours or not theirs:
        return None
    a, b = share(ours), share(theirs)
    if a.solved + b.solved in (0, a.n + b.n):  # all alike
        return Solved(a, b, 1.0)
    table = [[a.solved, b.solved], [a.n - a.solved, b.n - b.solved]]
    return Solved(a, b, float(boschloo_exact(table).pvalue))
