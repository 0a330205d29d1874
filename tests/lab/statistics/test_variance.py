"""Size and power of comparisons with pooled noise and with a bank, on tables whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import scipy.stats

from blockwright.lab.statistics import variance
from blockwright.lab.statistics.intervals import compare, holm
from blockwright.lab.statistics.variance import Left, Noise, paired, pooled, with_bank

SHARED = 0.6  # part of a run's variance that all arms of a seed share
OWN = math.sqrt(2 * (1 - SHARED))  # sd of a paired difference of such runs

Table = Mapping[str, Mapping[int, float]]


def tables(arms: int, seeds: int, count: int, effect: float = 0.0, noise: Sequence[float] = ()) -> list[Table]:
    """``count`` sweeps; arm 1 differs from the baseline, arm 0, by ``effect`` sd of a paired difference."""
    rng, sds = np.random.default_rng(4), np.array(noise or [1.0] * arms)[None, :, None]
    values = rng.standard_normal((count, 1, seeds)) * math.sqrt(SHARED)
    values = values + rng.standard_normal((count, arms, seeds)) * math.sqrt(1 - SHARED) * sds
    values[:, 1] += effect * OWN
    return [{str(arm): dict(enumerate(row)) for arm, row in enumerate(each.tolist())} for each in values]


def ps(table: Table, noise: Noise | None) -> list[float]:
    """p of every arm against arm 0, after Holm's correction."""
    compared = [compare(table[arm], table["0"], noise) for arm in list(table)[1:]]
    return [p for p in holm([each and each.p for each in compared]) if p is not None]


def power(arms: int, seeds: int, pool: bool, count: int) -> float:
    """Share of sweeps that see a difference of 2 sd in arm 1."""
    sweeps = tables(arms, seeds, count, effect=2.0)
    return float(np.mean([ps(table, pooled(table) if pool else None)[0] < 0.05 for table in sweeps]))


def size(arms: int, seeds: int, count: int, noise: Sequence[float] = ()) -> float:
    """Share of sweeps of equal arms that call any of them different."""
    return float(np.mean([min(ps(table, pooled(table))) < 0.05 for table in tables(arms, seeds, count, noise=noise)]))


COUNTS = [2000, pytest.param(20_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_three_seeds_of_four_arms_see_thrice_as_much(count: int) -> None:
    error = 4 * math.sqrt(0.25 / count)
    assert power(4, 3, pool=False, count=count) == pytest.approx(0.20, abs=error)
    assert power(4, 3, pool=True, count=count) == pytest.approx(0.58, abs=error)  # .60 without the guard


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arms", "seeds", "without", "with_pool"), [(4, 5, 0.69, 0.935), (6, 3, 0.12, 0.50), (4, 8, 0.98, 0.998)]
)
def test_power_of_other_tables(arms: int, seeds: int, without: float, with_pool: float) -> None:
    assert power(arms, seeds, pool=False, count=20_000) == pytest.approx(without, abs=0.01)
    assert power(arms, seeds, pool=True, count=20_000) == pytest.approx(with_pool, abs=0.01)


@pytest.mark.parametrize("count", COUNTS)
def test_pooled_noise_of_equal_arms_keeps_the_level(count: int) -> None:
    assert 0.035 <= size(4, 3, count) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arms", "seeds", "noise", "expected"),
    [
        (4, 3, (1, 1, 1, 2), 0.059),
        (4, 3, (2, 1, 1, 1), 0.077),
        (6, 3, (2, 1, 1, 1, 1, 1), 0.079),
        (4, 8, (2, 1, 1, 1), 0.083),
        (3, 3, (4, 1, 1), 0.083),  # of three arms the largest residual is never above 4 × the median
        (4, 3, (4, 1, 1, 1), 0.102),
    ],
)
def test_size_if_one_arm_is_noisier(arms: int, seeds: int, noise: Sequence[float], expected: float) -> None:
    assert size(arms, seeds, 20_000, noise) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_guard_limits_what_a_noisy_baseline_does(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = (4, 1, 1, 1, 1, 1)
    assert size(6, 5, count, noisy) < 0.08
    monkeypatch.setattr(variance, "UNEQUAL", math.inf)
    assert size(6, 5, count, noisy) > 0.14  # so a lost guard is seen


def test_residuals_are_what_arm_and_seed_do_not_explain() -> None:
    table = {"a": {0: 1.0, 1: 2.0, 2: 4.0}, "b": {0: 1.5, 1: 2.5, 2: 4.5}, "c": {0: 0.0, 1: 1.0, 2: 3.0}}
    exact = pooled(table)
    assert exact is not None and exact.sd == pytest.approx(0, abs=1e-12)
    one = pooled({**table, "c": {0: 0.0, 1: 1.3, 2: 2.7}})
    assert one is not None and (one.dof, one.source) == (4, "pooled")
    # The pairs of a and b are alike, those of c with either vary by var(0, .3, −.3): the mean over the three pairs.
    assert one.sd**2 == pytest.approx((0 + 0.09 + 0.09) / 3)


def test_arms_of_unlike_noise_are_not_pooled() -> None:
    rng = np.random.default_rng(0)
    table = {str(i): dict(enumerate(rng.normal(0, 10 if i == 3 else 1, 8))) for i in range(4)}
    assert pooled(table) is None


def test_too_little_is_not_pooled() -> None:
    two = {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.5}}
    assert pooled({}) is None and pooled(two) is None and pooled({**two, "c": {}}) is None
    assert pooled({**two, "c": {1: 2.0}}) is None and pooled({**two, "c": {7: 2.0}}) is None
    lost = pooled({**two, "c": {0: 1.2, 1: 2.1, 2: 3.0}})
    assert lost is not None and lost.dof == 2  # two seeds in common


def test_noise_of_a_pair_is_that_of_the_paired_t_test() -> None:
    noise = paired([0.1, 0.3, 0.2, 0.6])
    assert noise is not None
    expected = scipy.stats.ttest_1samp([0.1, 0.3, 0.2, 0.6], 0.0)
    assert noise.p(0.3, 4) == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval(0.95)
    assert noise.half(4, 0.95) == pytest.approx((high - low) / 2) and paired([1.0]) is None


def test_degrees_of_freedom_of_two_variances_are_welchs() -> None:
    one, two = [0.1, 0.5, 0.2, 0.9], [3.0, 3.1, 2.8, 3.3, 2.9, 3.4]
    parts = [Left(float(np.var(each, ddof=1)) / len(each), len(each) - 1) for each in (one, two)]
    assert (parts[0] + parts[1]).dof == pytest.approx(scipy.stats.ttest_ind(one, two, equal_var=False).df)
    assert (Left() + Left()).dof == math.inf and (Left() + parts[0]).dof == pytest.approx(3)


def test_what_tuning_leaves_is_there_at_any_number_of_seeds() -> None:
    plain, noise = Noise(0.01, 20, "pooled"), Noise(0.01, 20, "pooled", Left(1e-6, 4))
    assert noise.error(4) == pytest.approx(math.sqrt(0.01**2 / 4 + 1e-6))
    assert noise.error(10**8) == pytest.approx(0.001, rel=1e-3) and noise.dof_of_error(10**8) == pytest.approx(
        4, rel=0.01
    )
    assert noise.p(0.01, 9) > plain.p(0.01, 9) and noise.half(9, 0.95) > plain.half(9, 0.95)


# --- the bank ---------------------------------------------------------------------------------------------------------


def banked(effect: float, truth: float, count: int) -> float:
    """Share of comparisons of 3 seeds with a bank of 12 degrees of freedom and sd 1 that call a difference."""
    rng, bank = np.random.default_rng(5), 12
    seen = 0
    estimates = np.sqrt(rng.chisquare(bank, count) / bank)
    for differences, sd in zip(rng.normal(effect, truth, (count, 3)).tolist(), estimates.tolist(), strict=True):
        own = paired(differences)
        assert own is not None
        noise = with_bank(own, Noise(sd, bank, "bank"))
        seen += noise.p(sum(differences) / 3, 3) < 0.05
    return seen / count


@pytest.mark.parametrize("count", [4000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_bank_doubles_the_power_of_three_seeds(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error = 4 * math.sqrt(0.25 / count)
    assert banked(2.0, 1.0, count) == pytest.approx(0.81, abs=error)
    assert banked(0.0, 1.0, count) == pytest.approx(0.046, abs=4 * math.sqrt(0.046 / count))
    monkeypatch.setattr(variance, "DOUBTFUL", 1.0)
    assert banked(2.0, 1.0, count) == pytest.approx(0.90, abs=error)  # the price of the guard


@pytest.mark.slow
@pytest.mark.parametrize(("truth", "guarded", "not_guarded"), [(1.3, 0.088, 0.106), (2.0, 0.13, 0.228)])
def test_guard_limits_what_a_bank_of_quieter_sweeps_does(
    truth: float, guarded: float, not_guarded: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert banked(0.0, truth, 40_000) == pytest.approx(guarded, abs=0.006)
    monkeypatch.setattr(variance, "DOUBTFUL", 1.0)
    assert banked(0.0, truth, 40_000) == pytest.approx(not_guarded, abs=0.006)


def test_bank_adds_its_degrees_of_freedom() -> None:
    noise = with_bank(Noise(0.01, 2, "paired"), Noise(0.02, 6, "bank"))
    assert noise.dof == 8 and noise.source == "bank"
    assert noise.sd == pytest.approx(math.sqrt((2 * 0.01**2 + 6 * 0.02**2) / 8))
    loud = Noise(0.2, 2, "paired")
    assert with_bank(loud, Noise(0.02, 6, "bank")) == loud
    assert with_bank(enough := Noise(0.01, 30, "pooled"), Noise(0.02, 6, "bank")) == enough
