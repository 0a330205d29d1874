"""Size and power of comparisons with pooled noise and with a bank, on tables whose truth is known."""

import math
import random
import warnings

import numpy as np
import pytest
import scipy.stats

from blockwright.lab.statistics import intervals, variance
from blockwright.lab.statistics.intervals import compare, holm
from blockwright.lab.statistics.variance import Left, Noise, between, of_each_arm, of_sweep, paired, with_bank

SHARED = 0.6  # part of a run's variance that all arms of a seed share
OWN = math.sqrt(2 * (1 - SHARED))  # sd of a paired difference of such runs


def tables(arms, seeds, count, effect=0.0, noise=()):
    """``count`` sweeps; arm 1 differs from the baseline, arm 0, by ``effect`` sd of a paired difference."""
    rng, sds = np.random.default_rng(4), np.array(noise or [1.0] * arms)[None, :, None]
    values = rng.standard_normal((count, 1, seeds)) * math.sqrt(SHARED)
    values = values + rng.standard_normal((count, arms, seeds)) * math.sqrt(1 - SHARED) * sds
    values[:, 1] += effect * OWN
    return [{str(arm): dict(enumerate(row)) for arm, row in enumerate(each.tolist())} for each in values]


def ps(table, pool):
    """p of every arm against arm 0, after Holm's correction."""
    noises = {arm: between(table, arm, "0") if pool else None for arm in list(table)[1:]}
    compared = [compare(table[arm], table["0"], noise) for arm, noise in noises.items()]
    return [p for p in holm([each and each.p for each in compared]) if p is not None]


def power(arms, seeds, pool, count, effect):
    """Share of sweeps that see a difference in arm 1, in sd of a paired difference."""
    return float(np.mean([ps(table, pool)[0] < 0.05 for table in tables(arms, seeds, count, effect=effect)]))


def test_three_seeds_of_four_arms_see_twice_as_much():
    count = 600
    error = 4 * math.sqrt(0.25 / count)
    assert power(4, 3, pool=False, count=count, effect=2) == pytest.approx(0.20, abs=error)
    assert power(4, 3, pool=True, count=count, effect=2) == pytest.approx(0.42, abs=error)


def test_noise_of_equal_arms_has_the_degrees_of_freedom_that_are_planned():
    for arms, seeds in ((2, 9), (4, 9), (6, 9)):
        noises = [between(table, "1", "0") for table in tables(arms, seeds, 300)]
        whole = [each for each in noises if each is not None and each.arms == arms]
        assert np.mean([each.dof for each in whole]) == pytest.approx(variance.dof_of(arms, seeds), rel=0.15)
        assert len(whole) > 250 and np.mean([each.sd**2 for each in whole]) == pytest.approx(OWN**2, rel=0.12)


def table_of(*rows):
    return {str(i): dict(enumerate(row.tolist())) for i, row in enumerate(rows)}


def test_the_noisier_of_other_arms_is_told_by_exact_tests():
    rng = np.random.default_rng(0)
    for sd in (0.3, 1, 1.5, 2, 3, 5):
        rows = rng.normal(size=(3, 6)) * np.array([[1], [1], [sd]])
        ours, theirs = rows[2] - rows[0], rows[1] - rows[0]
        p = scipy.stats.pearsonr(ours + theirs, ours - theirs, alternative="greater").pvalue
        noise = between(table_of(*rows), "2", "0")
        assert (noise.source == "paired") == (p < 0.1)
    rng = np.random.default_rng(0)
    for sd in (0.3, 1, 1.5, 2, 3, 5):
        rows = rng.normal(size=(4, 6)) * np.array([[4], [1], [1], [sd]])
        apart, within = rows[3] - rows[1:3].mean(0), rows[1] - rows[2]
        ratio = np.var(apart, ddof=1) / 1.5 / (np.var(within, ddof=1) / 2)
        noise = between(table_of(*rows), "3", "0")
        assert (noise.source == "paired") == (scipy.stats.f.sf(ratio, 5, 5) < 0.1)


def test_too_little_noise_twice_the_same_and_none_at_all():
    rows = np.random.default_rng(0).normal(size=(5, 8))
    rows[4] *= 50
    quiet, loud = between(table_of(*rows[:4]), "1", "0"), between(table_of(*rows), "1", "0")
    assert quiet == loud and of_sweep(table_of(*rows[:4]), "0") == quiet
    assert of_sweep(table_of(*rows), "0") is None  # a bank has one figure
    rows = np.random.default_rng(1).normal(size=(4, 5))
    once = between(table_of(*rows), "1", "0")
    assert once == between(table_of(*rows, rows[1], rows[0], rows[3], rows[3]), "1", "0")
    rows = np.add.outer([0.0, 0.5, 1.0], [2.0, 3.0, 5.0])
    found = between(table_of(*rows), "1", "0")
    assert found.sd == 0 and found.p(0.5, 3) is None  # no noise at all is no evidence
    assert paired([0.8 - 0.7, 0.7 - 0.6, 0.6 - 0.5]).p(0.1, 3) is None
    large = between(table_of(*(1e200 * np.random.default_rng(0).normal(size=(4, 4)))), "1", "0")
    assert 0 < large.sd < math.inf
    two = {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.5}}
    own = paired([0.0, 0.5])
    assert between(two, "b", "a") == own == of_sweep(two, "a") == of_sweep({**two, "c": {}}, "a")
    assert between({**two, "c": {1: 2.0}}, "b", "a") is None and of_sweep({}, "a") is None
    assert of_sweep({"a": two["a"]}, "a") is None


def test_noise_of_pairs_and_of_sums_is_that_of_scipy():
    noise = paired([0.1, 0.3, 0.2, 0.6])
    expected = scipy.stats.ttest_1samp([0.1, 0.3, 0.2, 0.6], 0.0)
    assert noise.p(0.3, 4) == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval(0.95)
    assert noise.half(4, 0.95) == pytest.approx((high - low) / 2) and paired([1.0]) is None
    one, two = [0.1, 0.5, 0.2, 0.9], [3.0, 3.1, 2.8, 3.3, 2.9, 3.4]
    parts = [Left(float(np.var(each, ddof=1)) / len(each), len(each) - 1) for each in (one, two)]
    assert (parts[0] + parts[1]).dof == pytest.approx(scipy.stats.ttest_ind(one, two, equal_var=False).df)
    assert (Left() + Left()).dof == math.inf and (Left() + parts[0]).dof == pytest.approx(3)


def test_what_tuning_leaves_is_there_at_any_number_of_seeds():
    plain, noise = Noise(0.01, 20, "pooled"), Noise(0.01, 20, "pooled", Left(1e-6, 4))
    assert noise.error(4) == pytest.approx(math.sqrt(0.01**2 / 4 + 1e-6))
    assert noise.error(10**8) == pytest.approx(0.001, rel=1e-3) and noise.dof_of_error(10**8) == pytest.approx(
        4, rel=0.01
    )
    assert noise.p(0.01, 9) > plain.p(0.01, 9) and noise.half(9, 0.95) > plain.half(9, 0.95)


def banked(effect, truth, count):
    """Share of comparisons of 3 seeds with a bank of 12 degrees of freedom and sd 1 that call a difference."""
    rng, bank = np.random.default_rng(5), 12
    seen = 0
    estimates = np.sqrt(rng.chisquare(bank, count) / bank)
    for differences, sd in zip(rng.normal(effect, truth, (count, 3)).tolist(), estimates.tolist(), strict=True):
        own = paired(differences)
        noise = with_bank(own, Noise(sd, bank, "bank"))
        seen += noise.p(sum(differences) / 3, 3) < 0.05
    return seen / count


def test_bank_doubles_the_power_of_three_seeds(monkeypatch):
    count = 4000
    error = 4 * math.sqrt(0.25 / count)
    assert banked(2.0, 1.0, count) == pytest.approx(0.81, abs=error)
    assert banked(0.0, 1.0, count) == pytest.approx(0.046, abs=4 * math.sqrt(0.046 / count))
    monkeypatch.setattr(variance, "DOUBTFUL", 1.0)
    assert banked(2.0, 1.0, count) == pytest.approx(0.90, abs=error)  # the price of the guard


@pytest.mark.slow
@pytest.mark.parametrize(("truth", "guarded", "not_guarded"), [(1.3, 0.088, 0.106), (2.0, 0.13, 0.228)])
def test_guard_limits_what_a_bank_of_quieter_sweeps_does(truth, guarded, not_guarded, monkeypatch):
    assert banked(0.0, truth, 10_000) == pytest.approx(guarded, abs=0.011)
    monkeypatch.setattr(variance, "DOUBTFUL", 1.0)
    assert banked(0.0, truth, 10_000) == pytest.approx(not_guarded, abs=0.014)


def test_bank_adds_its_degrees_of_freedom():
    noise = with_bank(Noise(0.01, 2, "paired"), Noise(0.02, 6, "bank"))
    assert noise.dof == 8 and noise.source == "bank"
    assert noise.sd == pytest.approx(math.sqrt((2 * 0.01**2 + 6 * 0.02**2) / 8))
    loud = Noise(0.2, 2, "paired")
    assert with_bank(loud, Noise(0.02, 6, "bank")) == loud
    assert with_bank(enough := Noise(0.01, 30, "pooled"), Noise(0.02, 6, "bank")) == enough


def test_noise_of_each_arm_is_found_under_that_of_the_seeds():
    rng, known = random.Random(0), {"last": 0.010, "averaged": 0.007, "again": 0.010, "averaged again": 0.007}
    squares = dict.fromkeys(known, 0.0)
    for _ in range(1000):
        order = [rng.gauss(0, 0.05) for _ in range(8)]
        found = of_each_arm(
            {arm: {s: at + rng.gauss(0, sd) for s, at in enumerate(order)} for arm, sd in known.items()}
        )
        for arm, sd in found.items():
            squares[arm] += sd * sd / 1000
    assert {arm: math.sqrt(square) for arm, square in squares.items()} == pytest.approx(known, rel=0.06)


def test_two_arms_or_two_seeds_do_not_tell_whose_noise_it_is():
    assert of_each_arm({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 2.0, 1: 1.0, 2: 3.0}}) == {}
    assert of_each_arm({arm: {0: 1.0, 1: 2.0} for arm in "abc"}) == {}
    assert of_each_arm({"a": {}, "b": {0: 1.0}}) == {}


def test_interval_and_p_are_those_of_the_paired_t_test():
    for n in (2, 3, 5, 30):
        rng = random.Random(n)
        values = [rng.gauss(3, 0.1) for _ in range(n)]
        found = intervals.interval(values)
        expected = scipy.stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=scipy.stats.sem(values))
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-9) and found.n == n
        assert found.half == pytest.approx((expected[1] - expected[0]) / 2)
        arm, baseline = ({seed: rng.gauss(2, 0.1) for seed in range(n)} for _ in range(2))
        found = intervals.compare(arm, baseline)
        expected = scipy.stats.ttest_rel(list(arm.values()), list(baseline.values()))
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (found.difference.low, found.difference.high) == pytest.approx(tuple(expected.confidence_interval()))
    # By hand: t with 2 degrees of freedom is 4.302653 at 97.5 %, and its distribution is 1/2 + t/(2·sqrt(2 + t²)).
    found = intervals.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.30265272974946 / math.sqrt(3), rel=1e-9)
    t = 2 * math.sqrt(3)
    assert intervals.paired_p([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_holm_by_hand():
    # 0.01 · 3, then max(0.03, 0.02 · 2), then max(0.04, 0.03 · 1); what was not tested counts for nothing.
    assert intervals.holm([0.03, None, 0.01, 0.02]) == pytest.approx([0.04, None, 0.03, 0.04], nan_ok=True)
    assert intervals.holm([0.8, 0.9]) == [1.0, 1.0]
    assert intervals.holm([None]) == [None] and intervals.holm([]) == []


def test_only_seeds_that_both_have_are_compared_and_one_tells_nothing_of_noise_without_a_bank():
    found = intervals.compare({0: 2.0, 1: 2.5, 7: 9.0}, {1: 2.25, 0: 2.5, 5: 1.0})
    assert found.by_seed == {0: -0.5, 1: 0.25} and intervals.compare({0: 1.0}, {1: 1.0}) is None
    alone, banked = (intervals.compare({0: 1.0}, {0: 2.0}, noise) for noise in (None, Noise(0.1, 20, "bank")))
    assert alone.p is None and alone.difference.half is None
    assert banked.p < 0.001 and banked.difference.half is not None


def test_differences_without_noise_are_no_fault():
    assert intervals.compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert intervals.compare({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).p is None  # of a figure at its bound
    assert intervals.compare({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5}).p is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert intervals.paired_p([0.1 + 0.2, 0.3, 0.3]) is None


def test_interval_of_ratios_is_of_their_logarithms():
    found = intervals.ratio_interval([2.0, 0.5])
    assert found.mean == pytest.approx(1) and found.low * found.high == pytest.approx(1) and found.low > 0
    assert intervals.ratio_interval([1.5]).low is None


def test_noise_of_a_sweep_replaces_that_of_the_pair():
    arm, baseline = {0: 2.0, 1: 2.3, 2: 2.1}, {0: 2.1, 1: 2.1, 2: 2.3}
    own, noise = intervals.compare(arm, baseline), Noise(0.02, 6, "pooled")
    pooled = intervals.compare(arm, baseline, noise)
    assert (own.noise.source, own.noise.dof, pooled.noise) == ("paired", 2, noise)
    assert pooled.difference.mean == own.difference.mean and pooled.by_seed == own.by_seed
    # t with 6 degrees of freedom is 2.446912 at 97.5 %.
    assert pooled.difference.half == pytest.approx(2.446912 * 0.02 / math.sqrt(3), rel=1e-6)
    t = pooled.difference.mean / (0.02 / math.sqrt(3))
    assert pooled.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 6))
