"""Medians, quartiles, and ratios taken within a round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median, lower and upper quartile, and number of repeated measurements."""

    median: float
    q1: float
    q3: float
    n: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """ours ÷ theirs in every round that has both; None if there is no such round."""
    rounds = sorted(ours.keys() & theirs.keys())
    return spread([ours[r] / theirs[r] for r in rounds]) if rounds else None
