"""How much too large early estimates are: against simulated sweeps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from blockwright.lab.statistics.looks import Spend, nominal
from blockwright.lab.statistics.stopping import overestimate

SWEEPS = 50_000


@pytest.mark.parametrize(("effect", "spend"), [(0.5, "pocock"), (1.0, "obrien_fleming"), (2.0, "pocock")])
def test_overestimate_is_that_of_simulated_sweeps(spend: Spend, effect: float) -> None:
    looks = (4, 8, 12)
    values = np.random.default_rng(0).standard_normal((SWEEPS, looks[-1])) + effect
    going, estimates = np.ones(SWEEPS, bool), []
    for n, p in zip(looks[:-1], nominal(looks, spend)[:-1], strict=True):
        mean = values[:, :n].mean(1)
        stops = going & (abs(mean) * np.sqrt(n) > norm.isf(p / 2))
        estimates.append(abs(mean[stops]) - effect)
        going &= ~stops
    assert overestimate(looks, spend, effect) == pytest.approx(np.concatenate(estimates).mean(), abs=0.012)


def test_small_differences_are_overestimated_most() -> None:
    found = [overestimate((4, 8, 12, 16), "pocock", effect) for effect in (0.5, 1.0, 1.5, 2.0)]
    assert found == sorted(found, reverse=True) and found[-1] > 0
