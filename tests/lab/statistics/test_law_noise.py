"""Variances of what the rungs of a ladder share, against the tests of balanced tables, which are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from ladders import ladder

from blockwright.lab.statistics import variance
from blockwright.lab.statistics.law import Array, Rung
from blockwright.lab.statistics.law_noise import RungNoise, noise_of


def table(arms: int, seeds: int) -> tuple[list[Rung], Array, Array]:
    """The rungs of one size and duration, which arm each is of, and their residuals about the arms' means."""
    rng = np.random.default_rng(0)
    order = np.linspace(-2, 2, seeds)  # so that the variance of a seed is above 0
    rungs = [
        Rung(f"arm{arm}", "0", "0", seed, 1e5, 1e6, 2 + arm + order[seed] + rng.standard_normal())
        for arm in range(arms)
        for seed in range(seeds)
    ]
    member = np.repeat(np.eye(arms), seeds, axis=0)
    losses = np.array([rung.loss for rung in rungs])
    return rungs, member, losses - member @ (member.T @ losses) / seeds


def difference(noise: RungNoise, member: Array) -> tuple[float, float]:
    """Variance of the second arm's mean less the first's, and its degrees of freedom."""
    return noise.of((member[:, 1] - member[:, 0]) / member.sum(0)[0])


@pytest.mark.parametrize("seeds", [3, 4, 7])
def test_two_arms_are_the_paired_test(seeds: int) -> None:
    rungs, member, residuals = table(2, seeds)
    of, dof = difference(noise_of(rungs, member, residuals), member)
    exact = variance.paired([b.loss - a.loss for a, b in zip(rungs[:seeds], rungs[seeds:], strict=True)])
    assert exact is not None
    assert of == pytest.approx(exact.error(seeds) ** 2, rel=1e-3)
    assert dof == pytest.approx(exact.dof, rel=1e-3)


def test_more_arms_are_the_pooled_test() -> None:
    rungs, member, residuals = table(5, 4)
    of, dof = difference(noise_of(rungs, member, residuals), member)
    rows = np.array([rung.loss for rung in rungs]).reshape(5, 4)
    about = rows - rows.mean(0) - rows.mean(1, keepdims=True) + rows.mean()
    assert (of, dof) == pytest.approx((2 * (about**2).sum() / 12 / 4, 12), rel=1e-3)


@pytest.mark.slow
def test_variances_are_unbiased() -> None:
    """Products of residuals, without what the fit takes of them, found a correlation of arms of .46 for .50."""
    rng, seen = np.random.default_rng(1), []
    for _ in range(40):
        rungs = ladder(rng, noise=1.0)
        keys = [(rung.arm, rung.size, rung.duration) for rung in rungs]
        member = np.array([[float(key == cell) for cell in dict.fromkeys(keys)] for key in keys])
        losses = np.array([rung.loss for rung in rungs])
        seen.append(noise_of(rungs, member, losses - member @ (member.T @ losses / member.sum(0))).variances)
    error = np.std(seen, axis=0) / np.sqrt(len(seen))
    assert np.abs(np.mean(seen, axis=0) - [0.3, 0.5, 0.2]).max() < 3 * error.max()


def test_what_is_not_shared_is_left_out() -> None:
    """A variance at 0 has no uncertainty, which would take degrees of freedom of those that there are."""
    rungs = ladder(np.random.default_rng(3), pairing=0.0, trunk=0.0)
    losses = np.array([rung.loss for rung in rungs])
    found = noise_of(rungs, np.ones((len(rungs), 1)), np.where(np.arange(len(rungs)) % 2, 1.0, -1.0) * losses.std())
    assert found.variances[1] == 0 and found.uncertainty[1].tolist() == [0, 0, 0]
    assert np.isfinite(found.whitening).all()


def test_no_noise_at_all_is_no_fault() -> None:
    rungs = ladder(np.random.default_rng(0), noise=0.0)
    assert np.isfinite(noise_of(rungs, np.ones((len(rungs), 1)), np.zeros(len(rungs))).whitening).all()
