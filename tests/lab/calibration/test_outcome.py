"""What is seen of a control, and when an instrument passes: on losses whose truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from blockwright.lab.calibration.control import Control, Expect
from blockwright.lab.calibration.outcome import Outcome, Summary, judge


def outcome(expect: Expect, differences: Sequence[float], least: float = 0.0) -> Outcome:
    """Of runs that differ by so much, seed by seed."""
    control = Control("x", "about", expect, arm=("b=2",), least=least, seeds=tuple(range(len(differences))))
    losses = {}
    for (baseline, arm), difference in zip(control.pairs(), differences, strict=True):
        losses |= {baseline: 2.0, arm: 2.0 + difference}
    found = judge(control, losses)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("expect", "differences", "least", "seen", "passes"),
    [
        ("worse", [0.30, 0.31, 0.29], 0.2, "worse", True),
        ("worse", [0.30, 0.31, 0.29], 0.4, "worse", False),  # there, but nearly gone
        ("better", [0.30, 0.31, 0.29], 0.2, "worse", False),  # the other way
        ("better", [-0.30, -0.31, -0.29], 0.2, "better", True),
        ("worse", [0.9, -0.2, 0.1], 0.2, "none", False),
        ("worse", [0.0, 0.0, 0.0], 0.2, "identical", False),
        ("worse", [0.3, 0.3, math.inf], 0.2, "diverged", False),
        ("absent", [0.01, -0.02, 0.005], 0.0, "none", True),
        ("absent", [0.10, 0.11, 0.09], 0.0, "worse", False),
        ("absent", [0.0, 0.0, 0.0], 0.0, "identical", True),
        ("absent", [0.0, math.nan, 0.0], 0.0, "diverged", False),
        ("identical", [0.0, 0.0], 0.0, "identical", True),
        ("identical", [0.0, 1e-7], 0.0, "none", False),
        ("identical", [1e-7], 0.0, "none", False),
    ],
)
def test_what_is_seen(expect: Expect, differences: list[float], least: float, seen: str, passes: bool) -> None:
    found = outcome(expect, differences, least)
    assert (found.seen, found.passes) == (seen, passes)


def test_a_control_with_a_run_missing_has_no_outcome() -> None:
    control = Control("x", "about", "worse", arm=("b=2",), seeds=(0, 1))
    runs = [run for pair in control.pairs() for run in pair]
    assert judge(control, dict.fromkeys(runs[:-1], 2.0)) is None


def summary(found: int, false: int, identical: bool = True, effects: int = 8, absent: int = 3) -> Summary:
    there, gone = [0.3, 0.31, 0.29], [0.01, -0.02, 0.005]
    outcomes = [outcome("worse", there if i < found else gone) for i in range(effects)]
    outcomes += [outcome("absent", there if i < false else gone) for i in range(absent)]
    return Summary([*outcomes, outcome("identical", [0.0] if identical else [1e-6])])


@pytest.mark.parametrize(
    ("given", "passes", "counts"),
    [
        (summary(8, 0), True, "8 of 8 known effects found, 0 of 4 absent ones"),
        (summary(8, 1), True, "8 of 8 known effects found, 1 of 4 absent ones"),  # one in twenty is chance
        (summary(8, 2), False, "8 of 8 known effects found, 2 of 4 absent ones"),
        (summary(7, 0), False, "7 of 8 known effects found, 0 of 4 absent ones"),
        (summary(8, 0, identical=False), False, "8 of 8 known effects found, 1 of 4 absent ones"),  # never chance
        (Summary([]), False, "0 of 0 known effects found, 0 of 0 absent ones"),
    ],
)
def test_when_an_instrument_passes(given: Summary, passes: bool, counts: str) -> None:
    assert given.passes is passes and given.counts == counts
    assert counts in given.sentence and given.sentence.startswith("Calibrated") is passes


def test_absent_effects_are_seen_one_time_in_twenty_and_a_halved_rate_is_seen() -> None:
    """A/A pairs with the noise of the small text runs, sd 0.010; and a difference of 0.05, that of a halved rate."""
    noise = random.Random(0)

    def rate(effect: float, draws: int) -> float:
        seen = [outcome("absent", [effect + noise.gauss(0, 0.010) for _ in range(4)]) for _ in range(draws)]
        return sum(not each.passes for each in seen) / draws

    assert rate(0.0, 2000) == pytest.approx(0.05, abs=0.015)
    assert rate(0.05, 300) > 0.95
