"""Variances of what the rungs of a ladder share, against the tests of balanced tables, which are known exactly."""

import math

import numpy as np
import pytest
from ladders import ladder

from blockwright.lab.statistics import variance
from blockwright.lab.statistics.law import Common, Rung, noise_of, on_one_thread
from blockwright.lab.statistics.law_check import Usual, cells, conclude, expected, lack_of_fit
from blockwright.lab.statistics.law_fit import fit
from blockwright.lab.statistics.variance import Left


def table(arms, seeds):
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


def difference(noise, member):
    """Variance of the second arm's mean less the first's, and its degrees of freedom."""
    return noise.of((member[:, 1] - member[:, 0]) / member.sum(0)[0])


@pytest.mark.parametrize("seeds", [3, 4, 7])
def test_two_arms_are_the_paired_test(seeds):
    rungs, member, residuals = table(2, seeds)
    of, dof = difference(noise_of(rungs, member, residuals), member)
    exact = variance.paired([b.loss - a.loss for a, b in zip(rungs[:seeds], rungs[seeds:], strict=True)])
    assert of == pytest.approx(exact.error(seeds) ** 2, rel=1e-3)
    assert dof == pytest.approx(exact.dof, rel=1e-3)


def test_more_arms_are_the_pooled_test():
    rungs, member, residuals = table(5, 4)
    of, dof = difference(noise_of(rungs, member, residuals), member)
    rows = np.array([rung.loss for rung in rungs]).reshape(5, 4)
    about = rows - rows.mean(0) - rows.mean(1, keepdims=True) + rows.mean()
    assert (of, dof) == pytest.approx((2 * (about**2).sum() / 12 / 4, 12), rel=1e-3)


@pytest.mark.slow
def test_variances_are_unbiased():
    rng, seen = np.random.default_rng(1), []
    for _ in range(40):
        rungs = ladder(rng, noise=1.0)
        keys = [(rung.arm, rung.size, rung.duration) for rung in rungs]
        member = np.array([[float(key == cell) for cell in dict.fromkeys(keys)] for key in keys])
        losses = np.array([rung.loss for rung in rungs])
        seen.append(noise_of(rungs, member, losses - member @ (member.T @ losses / member.sum(0))).variances)
    error = np.std(seen, axis=0) / np.sqrt(len(seen))
    assert np.abs(np.mean(seen, axis=0) - [0.3, 0.5, 0.2]).max() < 3 * error.max()


def test_no_noise_shared_or_at_all_is_no_fault():
    rungs = ladder(np.random.default_rng(3), pairing=0.0, trunk=0.0)
    losses = np.array([rung.loss for rung in rungs])
    found = noise_of(rungs, np.ones((len(rungs), 1)), np.where(np.arange(len(rungs)) % 2, 1.0, -1.0) * losses.std())
    assert found.variances[1] == 0 and found.uncertainty[1].tolist() == [0, 0, 0]
    assert np.isfinite(found.whitening).all()
    rungs = ladder(np.random.default_rng(0), noise=0.0)
    assert np.isfinite(noise_of(rungs, np.ones((len(rungs), 1)), np.zeros(len(rungs))).whitening).all()


GAINS, S, SD = ((1.0, 1.0), (1.1, 1.0)), 1.1, 0.006


def known(rungs):
    """An arm tuned at each size, from five tries."""
    places = dict.fromkeys((rung.arm, rung.size) for rung in rungs)
    return [Common(arm, frozenset({size}), Left(SD**2, 3)) for arm, size in places]


@on_one_thread
def shares(trials, said, seed=3):
    """Shares of ladders under a true law whose law is rejected, and whose interval covers s.

    Args:
        trials: number of ladders
        said: whether what tuning leaves is known to the fit
        seed: of the noise
    """
    rng, wrong, covered = np.random.default_rng(seed), 0, 0
    for _ in range(trials):
        rungs = ladder(rng, GAINS, seeds=2, tuning=SD)
        found = fit(rungs, "plain", "apart", known(rungs) if said else ())
        p, log_s = lack_of_fit(found), found.speed_up("changed")
        wrong += p is not None and p < 0.01
        covered += log_s.low < math.log(S) < log_s.high
    return wrong / trials, covered / trials


@pytest.mark.slow
def test_it_is_no_misfit_and_intervals_cover():
    wrong, covered = shares(60, said=True)
    assert wrong <= 0.14 and covered >= 0.87
    wrong_unsaid, covered_unsaid = shares(60, said=False)
    assert wrong_unsaid > max(0.15, wrong) and covered_unsaid < covered


def interval(found):
    return found.speed_up("changed").half


@pytest.mark.slow
def test_it_widens_intervals_and_lessens_no_p():
    rungs = ladder(np.random.default_rng(5), GAINS, seeds=2)
    plain, wide = conclude(rungs, "plain"), conclude(rungs, "plain", known(rungs))
    assert interval(wide.fit) > interval(plain.fit)
    assert wide.lack_of_fit > plain.lack_of_fit
    assert wide.left_out.half > plain.left_out.half


@pytest.mark.slow
@pytest.mark.parametrize("form", ["apart", "alike"])
def test_it_is_planned_as_it_comes(form):
    rungs = ladder(np.random.default_rng(0), seeds=2)
    found = []
    for rng in map(np.random.default_rng, range(10)):
        drawn = ladder(rng, seeds=2, tuning=SD)
        found.append(fit(drawn, "plain", form, known(drawn)).speed_up("changed"))
    planned = expected(rungs, "plain", form, Usual(), known(rungs))
    assert planned.se == pytest.approx(np.median([each.se for each in found]), rel=0.1)
    assert planned.se > 1.3 * expected(rungs, "plain", form, Usual()).se


def test_what_tuning_leaves_is_in_differences_and_not_in_the_noise_of_seeds():
    rungs = ladder(np.random.default_rng(5), GAINS)
    alone, beside = cells(rungs), cells(rungs, known(rungs))
    assert beside.noise.variances == pytest.approx(alone.noise.variances, rel=1e-3)
    assert beside.noise.sd_of_run == pytest.approx(alone.noise.sd_of_run, rel=1e-3)
    assert beside.cost == pytest.approx(alone.cost, rel=1e-3)
    rungs = ladder(np.random.default_rng(5), GAINS)
    alone, beside = cells(rungs), cells(rungs, known(rungs))
    at = [rung.size == "1" for rung in rungs]
    weights = np.array([{"plain": -1.0, "changed": 1.0}[r.arm] * here for r, here in zip(rungs, at, strict=True)])
    weights /= sum(at) / 2
    (before, dof), (after, other) = alone.noise.of(weights), beside.noise.of(weights)
    assert after == pytest.approx(before + 2 * SD**2, rel=1e-3), "of all durations and seeds, and of either arm"
    assert 1 <= other <= dof
    rungs = ladder(np.random.default_rng(5), GAINS, seeds=1)
    assert cells(rungs, known(rungs)) is None
