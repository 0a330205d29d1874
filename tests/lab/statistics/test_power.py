"""The smallest differences that sweeps see, and the seeds to see them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from blockwright.lab.statistics.power import chance, detectable, seeds_to_see

SD = 0.007  # nats, of a paired difference


@pytest.mark.parametrize(
    ("seeds", "dof", "comparisons", "nats"),
    [
        (3, 2, 3, 0.040),
        (3, 6, 3, 0.0174),  # pooled over four arms
        (3, 26, 3, 0.0138),  # and a bank of 20
        (8, 7, 3, 0.0102),
        (8, 21, 3, 0.0086),
        (8, 41, 3, 0.0083),
        (3, 2, 1, 0.0228),
        (3, 22, 1, 0.0118),
        (17, 16, 1, 0.0051),
        (17, 36, 1, 0.0049),
    ],
)
def test_smallest_difference_seen_four_times_in_five(seeds: int, dof: float, comparisons: int, nats: float) -> None:
    digits = 3 if nats == 0.040 else 4
    assert round(detectable(SD, seeds, dof, comparisons), digits) == nats
    assert detectable(1.44 * SD, seeds, dof, comparisons) == pytest.approx(
        1.44 * detectable(SD, seeds, dof, comparisons)
    )


def test_degrees_of_freedom_are_those_of_the_paired_test_by_default() -> None:
    assert detectable(SD, 8) == detectable(SD, 8, 7) and chance(0.01, SD, 8) == chance(0.01, SD, 8, 7)
    assert detectable(SD, 1) == math.inf and detectable(SD, 1, dof=20) < math.inf


@pytest.mark.parametrize(("n", "difference"), [(3, 2.0), (8, 1.0), (16, 0.5)])
def test_chance_is_of_the_noncentral_t(n: int, difference: float) -> None:
    q, shift = scipy.stats.t.ppf(0.975, n - 1), difference * math.sqrt(n)
    expected = scipy.stats.nct.sf(q, n - 1, shift) + scipy.stats.nct.cdf(-q, n - 1, shift)
    assert chance(difference, 1.0, n) == pytest.approx(expected, abs=1e-4)
    assert chance(0.0, 1.0, n) == pytest.approx(0.05, abs=1e-4)


def test_chance_is_the_share_of_simulated_sweeps() -> None:
    values = np.random.default_rng(0).normal(0.012, SD, (20_000, 5))
    seen = np.mean(scipy.stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05 / 3)
    assert chance(0.012, SD, 5, comparisons=3) == pytest.approx(seen, abs=0.014)


def test_a_floor_is_seen_through_by_no_number_of_seeds() -> None:
    wider = math.hypot(SD / 4, 0.002) * 4
    assert chance(0.01, SD, 16, floor=0.002) == pytest.approx(chance(0.01, wider, 16))
    assert detectable(SD, 16, floor=0.002) == pytest.approx(detectable(wider, 16))
    assert seeds_to_see(0.01, SD, floor=0.002) > seeds_to_see(0.01, SD)
    with pytest.raises(ValueError, match="seeds"):
        seeds_to_see(0.003, SD, floor=0.002)


def test_seeds_are_the_fewest_that_see() -> None:
    for difference in (0.0051, 0.012, 0.0228):
        n = seeds_to_see(difference, SD)
        assert detectable(SD, n) <= difference < detectable(SD, n - 1)
    pooled = seeds_to_see(0.009, SD, lambda n: 3 * (n - 1), comparisons=3)
    assert pooled == 8 and seeds_to_see(0.009, SD, comparisons=3) == 10
    assert seeds_to_see(0.05, SD, lambda n: n - 1 + 20) == 1  # a bank sees large differences with one seed


def test_no_number_of_seeds_sees_nothing() -> None:
    with pytest.raises(ValueError, match="seeds"):
        seeds_to_see(0.0, SD)
