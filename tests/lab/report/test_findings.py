"""Findings of sweeps whose truth is known, and their words."""

import math
import random
from pathlib import Path

import pytest

from blockwright.lab.report import words
from blockwright.lab.report.findings import find, pareto
from blockwright.lab.report.sweep import Arm, Run, Sweep
from blockwright.lab.report.verdict import verdict
from blockwright.training.figure import Figure
from blockwright.training.result import Result

SWEEPS = 300


def sweep_of(losses, maximize=False):
    """Arm → (learning rate, seed) → final figure; the first arm is the baseline."""
    arms = []
    for name, values in losses.items():
        runs = [
            Run(i, Path(name), (), seed, lr, Result("completed", metrics={"val/loss": loss}))
            for i, ((lr, seed), loss) in enumerate(values.items())
        ]
        arms.append(Arm(name, (), tuple(runs)))
    figures = {"val/loss": Figure("loss", "nats", "more" if maximize else "less")}
    return Sweep(Path("x"), "ablation", "x", "", "val/loss", maximize, tuple(arms), 0, figures=figures)


def simulated(rng, effects, seeds, rates=(None,)):
    """A sweep of arms with these effects, a data order that moves all arms of a seed, and noise of each run's own."""
    order = [rng.gauss(0, 0.05) for _ in range(seeds)]
    return find(
        sweep_of(
            {
                f"arm{i}": {
                    (lr, seed): 2 + effect + order[seed] + rng.gauss(0, 0.01) for lr in rates for seed in range(seeds)
                }
                for i, effect in enumerate(effects)
            }
        )
    )


def test_what_differs_by_more_than_noise_is_found():
    rng = random.Random(0)
    found = [simulated(rng, [0.0, -0.1, 0.1, 0.0], 3) for _ in range(40)]
    for arm, kind in ((1, "better"), (2, "worse")):
        assert sum(verdict(of.arms[arm], of).kind == kind for of in found) > 34


@pytest.mark.slow
def test_learning_rates_chosen_on_the_same_seeds_do_not_cry_wolf():
    rng = random.Random(1)
    found = [simulated(rng, [0.0, 0.0], 3, rates=(0.001, 0.003, 0.01)) for _ in range(SWEEPS)]
    assert sum(verdict(of.arms[1], of).is_decided for of in found) / SWEEPS <= 0.09  # .05 and three standard errors


def test_each_arm_is_compared_at_its_best_rate_that_loses_no_seed():
    base = {(0.1, 0): 2.0, (0.1, 1): 2.1, (0.3, 0): 2.5, (0.3, 1): 2.6}
    arm = {(0.3, 0): 1.9, (0.3, 1): 1.8, (0.1, 0): 3.0, (0.1, 1): 3.0}
    found = find(sweep_of({"base": base, "arm": arm}))
    assert [f.lr for f in found.arms] == [0.1, 0.3]
    assert found.arms[1].comparison.by_seed == pytest.approx({0: -0.1, 1: -0.3})
    (tuned,) = found.arms[1].tuned
    assert [each.value for each in tuned.tries] == [0.1, 0.3] and tuned.edge == "largest" and tuned.used == 0.3
    turned = find(sweep_of({"base": base, "arm": arm}, maximize=True))
    assert [f.lr for f in turned.arms] == [0.3, 0.1]
    good = {(0.1, 0): 2.0, (0.1, 1): 2.0, (0.2, 0): 2.1, (0.2, 1): 2.1}
    wild = {**good, (0.4, 0): 1.0, (0.4, 1): math.nan}
    found = find(sweep_of({"base": good, "arm": wild}))
    assert found.arms[1].lr == 0.1 and len(found.lost) == 1


def test_front_holds_what_nothing_beats():
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 2.5), (4.0, 1.0), (3.5, 1.5)]
    assert pareto(points) == [1, 2, 0]
    assert pareto([(cost, -figure) for cost, figure in points], maximize=True) == [1, 2, 0]


def test_numbers_are_shown_with_the_digits_that_count():
    halves = {0.0123: 3, 0.00456: 4, 1.5: 1, 123.0: 0, None: 4, 0.0: 4, 1e-9: 6}
    assert {half: words.decimals(half) for half in halves} == halves
    counts = {0: "0", 999.4: "999.4", 999.6: "1k", 999_400: "999k", 999_600: "1M", -2.5e6: "−2.5M", 1e15: "1,000T"}
    assert {count: words.short(count) for count in counts} == counts
    shares = {4e-5: "0.00 %", -4e-5: "0.00 %", 6e-5: "+0.01 %", -0.2: "−20.00 %", 0.0: "0 %", None: "–"}
    assert {share: words.percent(share) for share in shares} == shares
    assert words.signed(-0.0013, 2) == words.signed(0.0013, 2) == "0.00" and words.signed(-0.013, 2) == "−0.01"
