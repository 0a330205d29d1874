"""Shares of seeds that solved a task: the exact test keeps its level, and sees what six seeds can show."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

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


@pytest.mark.parametrize(
    "chance", [0.5, pytest.param(0.15, marks=pytest.mark.slow), pytest.param(0.8, marks=pytest.mark.slow)]
)
def test_level_is_kept_and_is_nearer_to_it_than_fishers(chance: float) -> None:
    """Over all tables of 6 and 6 seeds, each with its exact probability."""
    weights = scipy.stats.binom.pmf(range(7), 6, chance)
    size = fisher = 0.0
    for ours in range(7):
        for theirs in range(7):
            found = compare(outcomes(ours, 6), outcomes(theirs, 6))
            assert found is not None
            probability = float(weights[ours] * weights[theirs])
            size += probability * (found.p < 0.05)
            fisher += probability * (scipy.stats.fisher_exact([[ours, theirs], [6 - ours, 6 - theirs]]).pvalue < 0.05)
    assert fisher <= size <= 0.05 + 1e-9


def test_six_seeds_see_a_task_that_one_arm_solves() -> None:
    rng, seen = np.random.default_rng(0), 0
    for _ in range(100):
        found = compare(outcomes(int(rng.binomial(6, 0.95)), 6), outcomes(int(rng.binomial(6, 0.15)), 6))
        assert found is not None
        seen += found.p < 0.05
    assert seen > 75
