"""Findings of sweeps whose truth is known, and their words."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from blockwright.lab.report import words
from blockwright.lab.report.findings import Findings, find, pareto
from blockwright.lab.report.sweep import Arm, Run, Sweep
from blockwright.lab.report.verdict import verdict
from blockwright.training.figure import Figure
from blockwright.training.result import Result

SWEEPS = 300


def sweep_of(losses: Mapping[str, Mapping[tuple[float | None, int], float]], maximize: bool = False) -> Sweep:
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


def simulated(
    rng: random.Random, effects: Sequence[float], seeds: int, rates: Sequence[float | None] = (None,)
) -> Findings:
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


# --- against the truth ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 5])
def test_interval_holds_the_truth_as_often_as_it_says(seeds: int) -> None:
    rng, effect, held = random.Random(seeds), -0.015, 0
    for _ in range(SWEEPS):
        comparison = simulated(rng, [0.0, effect], seeds).arms[1].comparison
        assert comparison is not None and comparison.difference.low is not None
        held += comparison.difference.low <= effect <= (comparison.difference.high or -math.inf)
    assert 0.91 <= held / SWEEPS <= 0.99  # three standard errors


@pytest.mark.slow
@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (4, 5)])
def test_what_is_the_same_is_called_noise(arms: int, seeds: int) -> None:
    rng = random.Random(arms)
    found = [simulated(rng, [0.0] * arms, seeds) for _ in range(SWEEPS)]
    quiet = sum(not any(f.evidence.is_different for f in of.others if f.evidence) for of in found)
    assert quiet / SWEEPS >= 0.91  # .95 less three standard errors


@pytest.mark.slow
def test_four_arms_without_a_correction_would_cry_wolf() -> None:
    rng = random.Random(4)
    found = [simulated(rng, [0.0] * 4, 3) for _ in range(SWEEPS)]
    quiet = sum(all(f.comparison is not None and (f.comparison.p or 0) >= 0.05 for f in of.others) for of in found)
    assert quiet / SWEEPS < 0.92


def test_what_differs_by_more_than_noise_is_found() -> None:
    rng = random.Random(0)
    found = [simulated(rng, [0.0, -0.1, 0.1, 0.0], 3) for _ in range(40)]
    for arm, kind in ((1, "better"), (2, "worse")):
        assert sum(verdict(of.arms[arm], of).kind == kind for of in found) > 34


@pytest.mark.slow
def test_learning_rates_chosen_on_the_same_seeds_do_not_cry_wolf() -> None:
    rng = random.Random(1)
    found = [simulated(rng, [0.0, 0.0], 3, rates=(0.001, 0.003, 0.01)) for _ in range(SWEEPS)]
    assert sum(verdict(of.arms[1], of).is_decided for of in found) / SWEEPS <= 0.09  # .05 and three standard errors


# --- learning rates ---------------------------------------------------------------------------------------------------


def test_each_arm_is_compared_at_its_best_rate() -> None:
    base: dict[tuple[float | None, int], float] = {(0.1, 0): 2.0, (0.1, 1): 2.1, (0.3, 0): 2.5, (0.3, 1): 2.6}
    arm: dict[tuple[float | None, int], float] = {(0.3, 0): 1.9, (0.3, 1): 1.8, (0.1, 0): 3.0, (0.1, 1): 3.0}
    found = find(sweep_of({"base": base, "arm": arm}))
    assert [f.lr for f in found.arms] == [0.1, 0.3]
    assert found.arms[1].comparison is not None
    assert found.arms[1].comparison.by_seed == pytest.approx({0: -0.1, 1: -0.3})
    (tuned,) = found.arms[1].tuned
    assert [each.value for each in tuned.tries] == [0.1, 0.3] and tuned.edge == "largest" and tuned.used == 0.3
    turned = find(sweep_of({"base": base, "arm": arm}, maximize=True))
    assert [f.lr for f in turned.arms] == [0.3, 0.1]


def test_rate_that_loses_a_seed_is_not_the_best() -> None:
    good: dict[tuple[float | None, int], float] = {(0.1, 0): 2.0, (0.1, 1): 2.0, (0.2, 0): 2.1, (0.2, 1): 2.1}
    wild: dict[tuple[float | None, int], float] = {**good, (0.4, 0): 1.0, (0.4, 1): math.nan}
    found = find(sweep_of({"base": good, "arm": wild}))
    assert found.arms[1].lr == 0.1 and len(found.lost) == 1


# --- the front --------------------------------------------------------------------------------------------------------


def test_front_holds_what_nothing_beats() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 2.5), (4.0, 1.0), (3.5, 1.5)]
    assert pareto(points) == [1, 2, 0]
    assert pareto([(cost, -figure) for cost, figure in points], maximize=True) == [1, 2, 0]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("half", "places"), [(0.0123, 3), (0.00456, 4), (1.5, 1), (123.0, 0), (None, 4), (0.0, 4), (1e-9, 6)]
)
def test_uncertainty_is_shown_with_two_digits(half: float | None, places: int) -> None:
    assert words.decimals(half) == places


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999.4, "999.4"),
        (999.6, "1k"),
        (999_400, "999k"),
        (999_600, "1M"),
        (-2.5e6, "−2.5M"),
        (1e15, "1,000T"),
    ],
)
def test_counts_have_three_digits_and_no_exponent(value: float | None, text: str) -> None:
    assert words.short(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(4e-5, "0.00 %"), (-4e-5, "0.00 %"), (6e-5, "+0.01 %"), (-0.2, "−20.00 %"), (0.0, "0 %"), (None, "–")],
)
def test_a_share_that_rounds_to_nothing_has_no_sign(share: float | None, text: str) -> None:
    assert words.percent(share) == text
