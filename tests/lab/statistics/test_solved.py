"""Shares of seeds that solved a task: the exact test keeps its level, and sees what six seeds can show."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from blockwright.lab.statistics.solved import compare, share


def outcomes(solved: int, n: int) -> dict[int, bool]:
    return {seed: seed < solved for seed in range(n)}


def test_shares_and_their_exact_intervals() -> None:
    # Clopper and Pearson: 8 of 8 is above (0.025)^(1/8), 0 of 8 below 1 − that.
    all_solved, none = share(outcomes(8, 8)), share(outcomes(0, 8))
    assert (all_solved.value, all_solved.high) == (1.0, 1.0) and all_solved.low == pytest.approx(0.025 ** (1 / 8))
    assert none.low == 0.0 and none.high == pytest.approx(1 - 0.025 ** (1 / 8))


def test_seeds_are_not_paired() -> None:
    ours, theirs = outcomes(7, 8), {100 + seed: solved for seed, solved in outcomes(1, 9).items()}
    found = compare(ours, theirs)
    assert found is not None and (found.ours.n, found.theirs.n) == (8, 9) and found.p < 0.01


def test_all_alike_is_no_difference() -> None:
    for solved in (0, 5):
        found = compare(outcomes(solved, 5), outcomes(solved, 5))
        assert found is not None and found.p == 1.0
    assert compare({}, outcomes(1, 2)) is None and compare(outcomes(1, 2), {}) is None


@pytest.fixture(scope="module")
def ps() -> NDArray[np.float64]:
    """p of all tables of 6 and 6 seeds, by the seeds that solved the task."""
    found = [[compare(outcomes(ours, 6), outcomes(theirs, 6)) for theirs in range(7)] for ours in range(7)]
    return np.array([[each.p for each in row if each] for row in found])


def called(ps: NDArray[np.float64], ours: float, theirs: float) -> float:
    """Share of sweeps whose arms solve the task with these chances that are called different; exact."""
    weights = scipy.stats.binom.pmf(np.arange(7), 6, ours), scipy.stats.binom.pmf(np.arange(7), 6, theirs)
    return float(weights[0] @ (ps < 0.05) @ weights[1])


@pytest.mark.slow
@pytest.mark.parametrize("chance", [0.15, 0.5, 0.8])
def test_level_is_kept_and_is_nearer_to_it_than_fishers(ps: NDArray[np.float64], chance: float) -> None:
    tables = [[[[ours, theirs], [6 - ours, 6 - theirs]] for theirs in range(7)] for ours in range(7)]
    fisher = np.array([[scipy.stats.fisher_exact(table).pvalue for table in row] for row in tables])
    assert called(fisher, chance, chance) <= called(ps, chance, chance) <= 0.05 + 1e-9


@pytest.mark.slow
def test_six_seeds_see_a_task_that_one_arm_solves(ps: NDArray[np.float64]) -> None:
    assert called(ps, 0.95, 0.15) > 0.85 and called(ps, 0.9, 0.6) < 0.3
