"""Two one-sided tests: the margins that are seen, and how often unequal arms are called the same."""

from __future__ import annotations

import math

import numpy as np
import pytest

from blockwright.lab.statistics.equivalence import margin_seen, same_within
from blockwright.lab.statistics.variance import paired

MARGINS = {3: 2.65, 4: 1.94, 5: 1.60, 8: 1.15, 10: 1.00, 12: 0.90, 16: 0.77, 20: 0.68, 30: 0.55}


def called_same(n: int, truth: float, margin: float, count: int) -> float:
    """Share of sweeps of n paired differences of sd 1 around ``truth`` that are shown to be within the margin."""
    called = 0
    for values in np.random.default_rng(3).normal(truth, 1.0, (count, n)).tolist():
        noise = paired(values)
        assert noise is not None
        called += same_within(sum(values) / n, noise.error(n), noise.dof, margin)
    return called / count


@pytest.mark.parametrize(("n", "margin"), MARGINS.items())
def test_smallest_margin_seen_four_times_in_five(n: int, margin: float) -> None:
    assert margin_seen(1.0, n) == pytest.approx(margin, abs=0.012)
    assert margin_seen(0.007, n) == pytest.approx(0.007 * margin_seen(1.0, n))


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 8])
def test_size_and_power_at_that_margin(n: int) -> None:
    count, margin = 10_000, margin_seen(1.0, n)
    assert called_same(n, 0.0, margin, count) == pytest.approx(0.80, abs=0.016)
    assert called_same(n, margin, margin, count) == pytest.approx(0.05, abs=0.009)


def test_more_degrees_of_freedom_see_smaller_margins() -> None:
    assert margin_seen(1.0, 3, dof=22) < 0.7 * margin_seen(1.0, 3)
    assert margin_seen(1.0, 1) == math.inf and margin_seen(1.0, 8, power=0.9) > margin_seen(1.0, 8)


def test_same_is_a_90_percent_interval_within_the_margin() -> None:
    # t with 10 degrees of freedom is 1.812 at 95 %.
    assert same_within(0.002, 0.001, 10, 0.0039) and not same_within(0.002, 0.001, 10, 0.0038)
    assert same_within(-0.002, 0.001, 10, 0.0039) and not same_within(-0.002, 0.001, 10, 0.0038)
    assert not same_within(0.002, 0.001, 10, 0.0039, level=0.025)
