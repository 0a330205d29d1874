"""Intervals and p-values are those of SciPy, and of formulas by hand."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
import scipy.stats

from blockwright.lab.statistics import intervals
from blockwright.lab.statistics.variance import Noise


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_interval_is_students(n: int) -> None:
    rng = random.Random(n)
    values = [rng.gauss(3, 0.1) for _ in range(n)]
    found = intervals.interval(values)
    expected = scipy.stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert found.half == pytest.approx((expected[1] - expected[0]) / 2) and found.n == n


@pytest.mark.parametrize("n", [2, 3, 8])
def test_p_is_of_the_paired_t_test(n: int) -> None:
    rng = random.Random(n)
    arm, baseline = ({seed: rng.gauss(2, 0.1) for seed in range(n)} for _ in range(2))
    found = intervals.compare(arm, baseline)
    assert found is not None
    expected = scipy.stats.ttest_rel(list(arm.values()), list(baseline.values()))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_interval_and_p_by_hand() -> None:
    # t with 2 degrees of freedom is 4.302653 at 97.5 %, and its distribution is 1/2 + t/(2·sqrt(2 + t²)).
    found = intervals.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.30265272974946 / math.sqrt(3), rel=1e-9)
    t = 2 * math.sqrt(3)
    assert intervals.paired_p([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_differences_that_are_alike_but_for_rounding_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert intervals.paired_p([0.1 + 0.2, 0.3, 0.3]) == pytest.approx(0.0, abs=1e-30)


def test_holm_by_hand() -> None:
    # 0.01 · 3, then max(0.03, 0.02 · 2), then max(0.04, 0.03 · 1); what was not tested counts for nothing.
    assert intervals.holm([0.03, None, 0.01, 0.02]) == pytest.approx([0.04, None, 0.03, 0.04], nan_ok=True)
    assert intervals.holm([0.8, 0.9]) == [1.0, 1.0]
    assert intervals.holm([None]) == [None] and intervals.holm([]) == []


def test_only_seeds_that_both_have_are_compared() -> None:
    found = intervals.compare({0: 2.0, 1: 2.5, 7: 9.0}, {1: 2.25, 0: 2.5, 5: 1.0})
    assert found is not None and found.by_seed == {0: -0.5, 1: 0.25}
    assert intervals.compare({0: 1.0}, {1: 1.0}) is None


def test_one_seed_tells_nothing_of_noise() -> None:
    found = intervals.compare({0: 1.0}, {0: 2.0})
    assert found is not None and found.p is None and found.difference.half is None


def test_the_same_to_the_last_digit_is_no_difference() -> None:
    same = intervals.compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same is not None and same.p == 1.0
    always = intervals.compare({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5})
    assert always is not None and always.p == 0.0  # no noise at all


def test_interval_of_ratios_is_of_their_logarithms() -> None:
    found = intervals.ratio_interval([2.0, 0.5])
    assert found.mean == pytest.approx(1) and found.low is not None and found.high is not None
    assert found.low * found.high == pytest.approx(1) and found.low > 0
    assert intervals.ratio_interval([1.5]).low is None


def test_noise_of_a_sweep_replaces_that_of_the_pair() -> None:
    arm, baseline = {0: 2.0, 1: 2.3, 2: 2.1}, {0: 2.1, 1: 2.1, 2: 2.3}
    own, noise = intervals.compare(arm, baseline), Noise(0.02, 6, "pooled")
    pooled = intervals.compare(arm, baseline, noise)
    assert own is not None and pooled is not None and own.noise is not None
    assert (own.noise.source, own.noise.dof, pooled.noise) == ("paired", 2, noise)
    assert pooled.difference.mean == own.difference.mean and pooled.by_seed == own.by_seed
    # t with 6 degrees of freedom is 2.446912 at 97.5 %.
    assert pooled.difference.half == pytest.approx(2.446912 * 0.02 / math.sqrt(3), rel=1e-6)
    t = pooled.difference.mean / (0.02 / math.sqrt(3))
    assert pooled.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 6))


def test_one_seed_with_the_noise_of_a_bank_tells_something() -> None:
    found = intervals.compare({0: 1.0}, {0: 2.0}, Noise(0.1, 20, "bank"))
    assert found is not None and found.p is not None and found.p < 0.001 and found.difference.half is not None


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_interval_of_normal_values_holds_their_mean(seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(1.0, 0.1, (10_000, seeds)).tolist()
    ends = [intervals.interval(each) for each in values]
    held = sum(each.low is not None and each.high is not None and each.low <= 1.0 <= each.high for each in ends)
    assert held / 10_000 == pytest.approx(0.95, abs=0.009)
