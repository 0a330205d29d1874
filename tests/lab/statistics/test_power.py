"""The smallest differences that sweeps see, and the seeds to see them."""

import math

import numpy as np
import pytest
import scipy.stats

from blockwright.lab.statistics.intervals import compare_shares, first_reached, share, speed_up
from blockwright.lab.statistics.power import chance, detectable, margin_seen, same_within, seeds_to_see
from blockwright.lab.statistics.variance import paired

SD = 0.007  # nats, of a paired difference


def test_smallest_difference_seen_four_times_in_five():
    for seeds, dof, comparisons, nats in [
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
    ]:
        digits = 3 if nats == 0.040 else 4
        assert round(detectable(SD, seeds, dof, comparisons), digits) == nats
        assert detectable(1.44 * SD, seeds, dof, comparisons) == pytest.approx(
            1.44 * detectable(SD, seeds, dof, comparisons)
        )


def test_chance_is_that_of_simulated_sweeps_at_the_degrees_of_freedom_of_pairs():
    assert detectable(SD, 8) == detectable(SD, 8, 7) and chance(0.01, SD, 8) == chance(0.01, SD, 8, 7)
    assert detectable(SD, 1) == math.inf and detectable(SD, 1, dof=20) < math.inf
    values = np.random.default_rng(0).normal(0.012, SD, (20_000, 5))
    seen = np.mean(scipy.stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05 / 3)
    assert chance(0.012, SD, 5, comparisons=3) == pytest.approx(seen, abs=0.014)


@pytest.mark.parametrize(("n", "difference"), [(3, 2.0), (8, 1.0), (16, 0.5)])
def test_chance_is_of_the_noncentral_t(n, difference):
    q, shift = scipy.stats.t.ppf(0.975, n - 1), difference * math.sqrt(n)
    expected = scipy.stats.nct.sf(q, n - 1, shift) + scipy.stats.nct.cdf(-q, n - 1, shift)
    assert chance(difference, 1.0, n) == pytest.approx(expected, abs=1e-4)
    assert chance(0.0, 1.0, n) == pytest.approx(0.05, abs=1e-4)


def test_seeds_are_the_fewest_that_see():
    for difference in (0.0051, 0.012, 0.0228):
        n = seeds_to_see(difference, SD)
        assert detectable(SD, n) <= difference < detectable(SD, n - 1)
    pooled = seeds_to_see(0.009, SD, lambda n: 3 * (n - 1), comparisons=3)
    assert pooled == 8 and seeds_to_see(0.009, SD, comparisons=3) == 10
    assert seeds_to_see(0.05, SD, lambda n: n - 1 + 20) == 1  # a bank sees large differences with one seed
    with pytest.raises(ValueError, match="seeds"):
        seeds_to_see(0.0, SD)
    wider = math.hypot(SD / 4, 0.002) * 4
    assert chance(0.01, SD, 16, floor=0.002) == pytest.approx(chance(0.01, wider, 16))
    assert detectable(SD, 16, floor=0.002) == pytest.approx(detectable(wider, 16))
    assert seeds_to_see(0.01, SD, floor=0.002) > seeds_to_see(0.01, SD)
    with pytest.raises(ValueError, match="seeds"):
        seeds_to_see(0.003, SD, floor=0.002)


MARGINS = {3: 2.65, 4: 1.94, 5: 1.60, 8: 1.15, 10: 1.00, 12: 0.90, 16: 0.77, 20: 0.68, 30: 0.55}


def called_same(n, truth, margin, count):
    """Share of sweeps of n paired differences of sd 1 around ``truth`` that are shown to be within the margin."""
    called = 0
    for values in np.random.default_rng(3).normal(truth, 1.0, (count, n)).tolist():
        noise = paired(values)
        called += same_within(sum(values) / n, noise.error(n), noise.dof, margin)
    return called / count


@pytest.mark.parametrize(("n", "margin"), MARGINS.items())
def test_smallest_margin_seen_four_times_in_five(n, margin):
    assert margin_seen(1.0, n) == pytest.approx(margin, abs=0.012)
    assert margin_seen(0.007, n) == pytest.approx(0.007 * margin_seen(1.0, n))


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 8])
def test_size_and_power_at_that_margin(n):
    count, margin = 10_000, margin_seen(1.0, n)
    assert called_same(n, 0.0, margin, count) == pytest.approx(0.80, abs=0.016)
    assert called_same(n, margin, margin, count) == pytest.approx(0.05, abs=0.009)


def test_same_is_a_90_percent_interval_within_the_margin():
    assert same_within(0.002, 0.001, 10, 0.0039) and not same_within(0.002, 0.001, 10, 0.0038)
    assert same_within(-0.002, 0.001, 10, 0.0039) and not same_within(-0.002, 0.001, 10, 0.0038)
    assert not same_within(0.002, 0.001, 10, 0.0039, level=0.025)
    assert margin_seen(1.0, 3, dof=22) < 0.7 * margin_seen(1.0, 3)
    assert margin_seen(1.0, 1) == math.inf and margin_seen(1.0, 8, power=0.9) > margin_seen(1.0, 8)


def outcomes(solved, n):
    return {seed: seed < solved for seed in range(n)}


def test_shares_are_compared_exactly_and_not_paired():
    all_solved, none = share(outcomes(8, 8)), share(outcomes(0, 8))
    assert (all_solved.value, all_solved.high) == (1.0, 1.0) and all_solved.low == pytest.approx(0.025 ** (1 / 8))
    assert none.low == 0.0 and none.high == pytest.approx(1 - 0.025 ** (1 / 8))
    ours, theirs = outcomes(7, 8), {100 + seed: solved for seed, solved in outcomes(1, 9).items()}
    found = compare_shares(ours, theirs)
    assert found is not None and (found.ours.n, found.theirs.n) == (8, 9) and found.p < 0.01
    for solved in (0, 5):
        found = compare_shares(outcomes(solved, 5), outcomes(solved, 5))
        assert found is not None and found.p == 1.0
    assert compare_shares({}, outcomes(1, 2)) is None and compare_shares(outcomes(1, 2), {}) is None


@pytest.fixture(scope="module")
def ps():
    """p of all tables of 6 and 6 seeds, by the seeds that solved the task."""
    found = [[compare_shares(outcomes(ours, 6), outcomes(theirs, 6)) for theirs in range(7)] for ours in range(7)]
    return np.array([[each.p for each in row if each] for row in found])


def called(ps, ours, theirs):
    """Share of sweeps whose arms solve the task with these chances that are called different; exact."""
    weights = scipy.stats.binom.pmf(np.arange(7), 6, ours), scipy.stats.binom.pmf(np.arange(7), 6, theirs)
    return float(weights[0] @ (ps < 0.05) @ weights[1])


@pytest.mark.slow
@pytest.mark.parametrize("chance", [0.15, 0.5, 0.8])
def test_level_is_kept_and_is_nearer_to_it_than_fishers(ps, chance):
    tables = [[[[ours, theirs], [6 - ours, 6 - theirs]] for theirs in range(7)] for ours in range(7)]
    fisher = np.array([[scipy.stats.fisher_exact(table).pvalue for table in row] for row in tables])
    assert called(fisher, chance, chance) <= called(ps, chance, chance) <= 0.05 + 1e-9


@pytest.mark.slow
def test_six_seeds_see_a_task_that_one_arm_solves(ps):
    assert called(ps, 0.95, 0.15) > 0.85 and called(ps, 0.9, 0.6) < 0.3


def power_law(tokens, faster=1.0):
    return [(t, 2 + 30 * (t * faster) ** -0.5) for t in tokens]


@pytest.mark.parametrize("faster", [2.0, 1.25, 1.0, 0.5])
def test_speed_up_is_how_many_times_fewer_tokens(faster):
    tokens = [1000.0 * i for i in range(1, 101)]
    assert speed_up(power_law(tokens, faster), power_law(tokens)) == pytest.approx(faster, rel=0.005)


def test_loss_is_reached_between_two_measurements():
    curve = [(10.0, 4.0), (20.0, math.nan), (30.0, 2.0), (40.0, 3.0)]
    assert first_reached(curve, 3.0) == 20.0
    assert first_reached(curve, 4.5) is None  # some time before
    assert first_reached(curve, 1.0) is None
    assert speed_up([(40.0, 3.9)], curve) is None and speed_up([(40.0, 1.0)], curve) is None
    assert speed_up([], curve) is None and speed_up([(1.0, math.nan)], curve) is None
