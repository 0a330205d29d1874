"""Scales from values to pixels, and the ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as counting
from itertools import pairwise

from blockwright.lab.report.words import MINUS

SLACK = 1e-9  # share of an axis that is lost to rounding
POWERS = ((1,), (1, 3), (1, 2, 5))  # multiples of powers of ten, the fewest first


@dataclass(frozen=True)
class Scale:
    """A mapping from values to pixels.

    Args:
        low, high: values at the ends
        start, end: pixels there
        log: whether equal ratios are equal distances
        whole: True for counts, whose ticks are whole numbers
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values within the scale, about as many as ``most``."""
        found = self._powers() if self.log else []
        if len(found) >= 3:
            return found[:: max(1, round(len(found) / (most + 1)))]
        step = _step((self.high - self.low) / most, self.whole)
        slack = SLACK * (self.high - self.low)
        first, last = math.ceil((self.low - slack) / step), math.floor((self.high + slack) / step)
        return [n * step for n in range(first, last + 1)]

    def _powers(self) -> list[float]:
        """At least three multiples of powers of ten, if the scale holds as many."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = ([m * 10.0**e for e in exponents for m in multiples] for multiples in POWERS)
        held = ([v for v in values if self.low * (1 - SLACK) <= v <= self.high * (1 + SLACK)] for values in every)
        return next((values for values in held if len(values) >= 3), [])


def _step(least: float, whole: bool) -> float:
    """The smallest round distance between ticks of at least ``least``: 1, 2, 2.5 or 5 times a power of ten."""
    rounds = (m * 10.0**e for e in counting(math.floor(math.log10(least))) for m in (1, 2, 2.5, 5))
    return next(step for step in rounds if step >= least * (1 - SLACK) and (not whole or step == int(step)))


def padded(values: Sequence[float], share: float = 0.06, least: float = 0.0) -> tuple[float, float]:
    """A range slightly wider than the values, and at least ``least`` times their middle."""
    low, high = min(values), max(values)
    room = max((high - low) * (1 + 2 * share), least * abs(low + high) / 2, 1e-9 * abs(high) or 1.0)
    middle = (low + high) / 2
    return middle - room / 2, middle + room / 2


def spelt(values: Sequence[float]) -> list[str]:
    """Numbers of one axis, formatted with as many decimals as their distance requires."""
    if len(values) < 2:
        return [f"{v:.4g}" for v in values]
    step = min(b - a for a, b in pairwise(values))
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    if places and round(step * 10**places, 6) != round(step * 10**places):  # 0.025
        places += 1
    return [f"{0.0 if abs(v) < step / 1e6 else v:.{places}f}".replace("-", MINUS) for v in values]
