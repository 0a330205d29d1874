"""Speed-up of curves whose ratio is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from blockwright.lab.statistics.speed import first_reached, speed_up


def power_law(tokens: Sequence[float], faster: float = 1.0) -> list[tuple[float, float]]:
    return [(t, 2 + 30 * (t * faster) ** -0.5) for t in tokens]


@pytest.mark.parametrize("faster", [2.0, 1.25, 1.0, 0.5])
def test_speed_up_is_how_many_times_fewer_tokens(faster: float) -> None:
    tokens = [1000.0 * i for i in range(1, 101)]
    assert speed_up(power_law(tokens, faster), power_law(tokens)) == pytest.approx(faster, rel=0.005)


def test_loss_is_reached_between_two_measurements() -> None:
    curve = [(10.0, 4.0), (20.0, math.nan), (30.0, 2.0), (40.0, 3.0)]
    assert first_reached(curve, 3.0) == 20.0
    assert first_reached(curve, 4.5) is None  # some time before
    assert first_reached(curve, 1.0) is None
    assert speed_up([(40.0, 3.9)], curve) is None and speed_up([(40.0, 1.0)], curve) is None
    assert speed_up([], curve) is None and speed_up([(1.0, math.nan)], curve) is None
