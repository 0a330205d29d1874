"""Differences at the rungs of a ladder: what their intervals cover, and what tuning leaves in them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ladder_folder
import numpy as np
import pytest
from ladders import ARMS, ladder, loss

from blockwright.lab.ladder.design import Tuned, common_of
from blockwright.lab.ladder.differences import Difference, of_rungs, over_all
from blockwright.lab.ladder.findings import Findings
from blockwright.lab.statistics.tuning import Fit, Try

SIZES, RATIOS, GAINS = [1e5 * 2**i for i in range(4)], (5, 10), ((1.0, 1.0), (1.3, 1.2))


def findings(rungs: list[Any], seeds: int) -> Findings:
    """Of simulated rungs, as if an outline had planned them."""
    outline = ladder_folder.outline(dict.fromkeys(ARMS[:2], (1.0, 1.0)), seeds=seeds, ratios=RATIOS)
    sizes = {str(i): replace(size, steps={"0": 500, "1": 1000}) for i, size in enumerate(outline.sizes.values())}
    return Findings(Path(), {}, replace(outline, sizes=sizes), tuple(rungs), None, {}, {}, ())


def simulated(rng: np.random.Generator, seeds: int = 2, **settings: Any) -> Findings:
    return findings(ladder(rng, GAINS, sizes=SIZES, ratios=RATIOS, seeds=seeds, **settings), seeds)


def covers(each: Difference, truth: float) -> bool:
    assert each.interval.low is not None and each.interval.high is not None
    return each.interval.low < truth < each.interval.high


@pytest.mark.slow
def test_intervals_of_two_seeds_cover_the_true_differences() -> None:
    """Of a rung, and of the mean of all; each at 95 %, and no wider than so many trainings allow."""
    rng, trials, of_one, of_all, widths = np.random.default_rng(5), 100, 0, 0, []
    truth = {
        (str(i), str(j)): loss(1.3 * size, 1.2 * ratio * size) - loss(size, ratio * size)
        for i, size in enumerate(SIZES)
        for j, ratio in enumerate(RATIOS)
    }
    for _ in range(trials):
        found = simulated(rng)
        rungs, mean = of_rungs(found, ARMS[1]), over_all(found, ARMS[1])
        assert mean is not None and rungs.keys() == truth.keys()
        of_one += covers(rungs["1", "0"], truth["1", "0"])
        of_all += covers(mean, math.fsum(truth.values()) / len(truth))
        widths.append(rungs["1", "0"].interval.half or 0.0)
    assert min(of_one, of_all) / trials >= 0.885  # .95 less three standard errors
    alone = 12.7 * 0.007  # nats, by Student's t of the two differences of a rung
    assert np.mean(widths) < alone / 4


@pytest.mark.slow
def test_an_equal_arm_is_seldom_called_different() -> None:
    rng, trials = np.random.default_rng(6), 100
    equal = ((1.0, 1.0), (1.0, 1.0))
    found = (findings(ladder(rng, equal, sizes=SIZES, ratios=RATIOS, seeds=2), 2) for _ in range(trials))
    ps = [mean.p for each in found if (mean := over_all(each, ARMS[1])) is not None]
    assert len(ps) == trials and np.mean([p is not None and p < 0.05 for p in ps]) <= 0.115  # three errors


def test_what_tuning_leaves_widens_them() -> None:
    """At a size that was tuned by what it left there, elsewhere by the mean; in the mean of all by their shares."""
    found = simulated(np.random.default_rng(7))
    fit = Fit(0.01, 0.05, 0.004, None, shake=1e4, spread=0.02, dof=3)
    tries = (Try(0.01, 2.0),)
    assert found.seeds is not None
    tuned = {("0", arm): Tuned(tries, fit) for arm in ARMS[:2]}
    other = replace(found, common=common_of(found.outline, tuned, found.seeds.noise.sd_of_run))
    for place in (("0", "0"), ("2", "1")):
        before, after = (of_rungs(each, ARMS[1])[place].interval for each in (found, other))
        assert before.half is not None and after.half is not None
        assert before.mean == after.mean and after.half > before.half
    mean, wider = (over_all(each, ARMS[1]) for each in (found, other))
    assert mean is not None and wider is not None and mean.p is not None and wider.p is not None
    assert mean.interval.half is not None and wider.interval.half is not None
    assert wider.p > mean.p and wider.interval.half > mean.interval.half


def test_one_seed_has_a_difference_and_no_interval() -> None:
    found = simulated(np.random.default_rng(8), seeds=1)
    mean = over_all(found, ARMS[1])
    assert mean is not None and mean.p is None and mean.interval.half is None and mean.interval.n == 1


def test_only_common_seeds_count() -> None:
    whole = simulated(np.random.default_rng(9))
    some = replace(
        whole, rungs=tuple(r for r in whole.rungs if not (r.arm == ARMS[1] and r.seed == 1 and r.size == "0"))
    )
    losses = {(r.arm, r.size, r.duration, r.seed): r.loss for r in whole.rungs}
    place = ("0", "0")
    assert of_rungs(some, ARMS[1])[place].interval.mean == pytest.approx(
        losses[ARMS[1], *place, 0] - losses[ARMS[0], *place, 0]
    )
    none = replace(whole, rungs=tuple(r for r in whole.rungs if r.arm == ARMS[0]))
    assert over_all(none, ARMS[1]) is None and of_rungs(none, ARMS[1]) == {}


def test_losses_without_noise_are_no_fault() -> None:
    """Of rungs that are all alike, as where a metric is constant."""
    whole = simulated(np.random.default_rng(9))
    alike = replace(whole, rungs=tuple(replace(r, loss=2.0) for r in whole.rungs))
    mean = over_all(alike, ARMS[1])
    assert mean is not None and mean.interval.mean == 0.0
    assert mean.p in (None, 1.0) and (mean.interval.half or 0.0) < 1e-9
