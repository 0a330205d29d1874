"""The noise of each arm: against arms whose noise is known."""

from __future__ import annotations

import math
import random

import pytest

from blockwright.lab.statistics.variance import of_each_arm


def test_noise_of_each_arm_is_found_under_that_of_the_seeds() -> None:
    rng, known = random.Random(0), {"last": 0.010, "averaged": 0.007, "again": 0.010, "averaged again": 0.007}
    squares = dict.fromkeys(known, 0.0)
    for _ in range(1000):
        order = [rng.gauss(0, 0.05) for _ in range(8)]
        found = of_each_arm(
            {arm: {s: at + rng.gauss(0, sd) for s, at in enumerate(order)} for arm, sd in known.items()}
        )
        for arm, sd in found.items():
            squares[arm] += sd * sd / 1000
    assert {arm: math.sqrt(square) for arm, square in squares.items()} == pytest.approx(known, rel=0.06)


def test_two_arms_or_two_seeds_do_not_tell_whose_noise_it_is() -> None:
    assert of_each_arm({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 2.0, 1: 1.0, 2: 3.0}}) == {}
    assert of_each_arm({arm: {0: 1.0, 1: 2.0} for arm in "abc"}) == {}
    assert of_each_arm({"a": {}, "b": {0: 1.0}}) == {}
