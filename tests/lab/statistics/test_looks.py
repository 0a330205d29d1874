"""Looks at growing sweeps: what all of them together call a difference, and after how many seeds."""

import numpy as np
import pytest
import scipy.stats
from pairwise import each
from scipy.stats import norm

from blockwright.lab.statistics.looks import SPENDING, nominal, overestimate

FOUR = (4, 8, 12, 16)


class Stopped:
    """Simulated sweeps with paired differences of sd 1 around ``effect``, at the looks.

    different, same: shares of sweeps that end so; seeds: mean number run; error: mean of estimate − truth
    """

    def __init__(
        self, looks, ps, effect, count,
        margin = 0.0, sides = (),
    ):  # fmt: skip
        values = np.random.default_rng(2).standard_normal((count, looks[-1])) + effect
        verdict, at, estimate = np.zeros(count, int), np.full(count, looks[-1]), values.mean(1)
        for i, n in enumerate(looks):
            mean = values[:, :n].mean(1)
            error = values[:, :n].std(1, ddof=1) / np.sqrt(n)
            different = (verdict == 0) & (2 * scipy.special.stdtr(n - 1, -abs(mean) / error) < ps[i])
            verdict[different] = 1
            same = np.zeros(count, bool)
            if margin:
                same = (verdict == 0) & (abs(mean) + scipy.stats.t.isf(sides[i], n - 1) * error < margin)
                verdict[same] = 2
            at[different | same], estimate[different | same] = n, mean[different | same]
        self.different, self.same = float((verdict == 1).mean()), float((verdict == 2).mean())
        self.seeds, self.error = float(at.mean()), float(estimate.mean()) - effect


def test_nominal_ps_are_those_of_400_000_simulated_paths():
    for seeds, spend, ps in [
        ((3, 5, 8, 12), "obrien_fleming", (0.00006, 0.0020, 0.0134, 0.0400)),
        ((3, 5, 8, 12), "pocock", (0.0161, 0.0131, 0.0159, 0.0187)),
        (FOUR, "obrien_fleming", (0.00006, 0.0047, 0.0189, 0.0374)),
        (FOUR, "pocock", (0.0161, 0.0162, 0.0163, 0.0166)),
    ]:
        assert nominal(seeds, spend) == pytest.approx(ps, abs=0.0004, rel=0.02)


@pytest.mark.parametrize("spend", ["obrien_fleming", "pocock"])
def test_paths_spend_exactly_the_level(spend):
    ps, rng = nominal(FOUR, spend), np.random.default_rng(7)
    sums = np.cumsum(rng.standard_normal((400_000, 4)) * 2, axis=1)
    beyond = abs(sums) / np.sqrt(FOUR) > scipy.stats.norm.isf(np.array(ps) / 2)
    for look in range(4):
        spent = beyond[:, : look + 1].any(1).mean()
        assert spent == pytest.approx(SPENDING[spend](FOUR[look] / 16, 0.045), abs=0.0013)


def test_looks_spend_the_level_and_without_spending_cry_wolf():
    assert nominal([8], "obrien_fleming", 0.05) == pytest.approx((0.05,))
    assert nominal([8], "pocock", 0.05) == pytest.approx((0.05,))
    assert 0.13 < Stopped(FOUR, [0.05] * 4, 0.0, 20_000).different < 0.15


@pytest.mark.parametrize(
    ("looks", "spend"), each([(3, 5, 8, 12), FOUR, (5, 10, 15, 20), (3, 6, 12)], ["obrien_fleming", "pocock"])
)
def test_size_of_all_looks_together(looks, spend):
    assert 0.045 <= Stopped(looks, nominal(looks, spend), 0.0, 20_000).different <= 0.055


def test_large_differences_stop_early():
    for spend, effect, seeds, power in [
        ("obrien_fleming", 0.0, 15.9, None),
        ("obrien_fleming", 1.0, 12.1, 0.95),
        ("obrien_fleming", 2.0, 8.4, None),
        ("pocock", 0.0, 15.6, None),
        ("pocock", 1.0, 10.6, 0.91),
        ("pocock", 2.0, 6.3, None),
    ]:
        stopped = Stopped(FOUR, nominal(FOUR, spend), effect, 20_000)
        assert stopped.seeds == pytest.approx(seeds, abs=0.2)
        assert power is None or stopped.different == pytest.approx(power, abs=0.012)


def test_early_estimates_are_too_large_of_small_differences_most():
    for spend in ("obrien_fleming", "pocock"):
        assert 0.03 < Stopped(FOUR, nominal(FOUR, spend), 1.0, 20_000).error < 0.10
    found = [overestimate((4, 8, 12, 16), "pocock", effect) for effect in (0.5, 1.0, 1.5, 2.0)]
    assert found == sorted(found, reverse=True) and found[-1] > 0


@pytest.mark.parametrize(
    ("margin", "effect", "same", "different", "seeds"),
    [(1.0, 0.0, 0.89, 0.05, 11.1), (1.0, 1.0, 0.04, 0.90, None), (1.5, 0.0, 0.97, None, 7.5)],
)
def test_looks_for_difference_and_for_equivalence(margin, effect, same, different, seeds):
    sides = [p / 2 for p in nominal(FOUR, "pocock", 0.10)]
    stopped = Stopped(FOUR, nominal(FOUR, "pocock", 0.05), effect, 20_000, margin, sides)
    assert stopped.same == pytest.approx(same, abs=0.012)
    assert different is None or stopped.different == pytest.approx(different, abs=0.012)
    assert seeds is None or stopped.seeds == pytest.approx(seeds, abs=0.2)


SWEEPS = 50_000


@pytest.mark.parametrize(("effect", "spend"), [(0.5, "pocock"), (1.0, "obrien_fleming"), (2.0, "pocock")])
def test_overestimate_is_that_of_simulated_sweeps(spend, effect):
    looks = (4, 8, 12)
    values = np.random.default_rng(0).standard_normal((SWEEPS, looks[-1])) + effect
    going, estimates = np.ones(SWEEPS, bool), []
    for n, p in zip(looks[:-1], nominal(looks, spend)[:-1], strict=True):
        mean = values[:, :n].mean(1)
        stops = going & (abs(mean) * np.sqrt(n) > norm.isf(p / 2))
        estimates.append(abs(mean[stops]) - effect)
        going &= ~stops
    assert overestimate(looks, spend, effect) == pytest.approx(np.concatenate(estimates).mean(), abs=0.012)
