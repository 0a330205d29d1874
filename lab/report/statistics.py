"""What several seeds can tell: intervals, paired differences, many comparisons at once, and how much faster one learns.

Pure functions of numbers. Left out: tests that assume no normal noise (at three seeds they can find nothing), and the
noise that no seed makes: of the text that was held out, and of the learning rates that were not tried.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95  # of every interval; what remains is how often noise is taken for a difference


@dataclass(frozen=True)
class Interval:
    """A mean, and how far around it the truth lies in ``LEVEL`` of all such experiments.

    Args:
        mean: of the values; the geometric one of ratios
        low, high: ends of the interval; None for a single value, which tells nothing of its noise
        n: number of values
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half its width; for means and differences, whose intervals are even."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline, over the seeds that both have.

    Args:
        difference: arm − baseline
        by_seed: seed → arm − baseline
        p: how often mere noise would make as large a difference; None where it cannot be said
        corrected: the same after Holm's correction over all comparisons of the sweep
    """

    difference: Interval
    by_seed: Mapping[int, float]
    p: float | None
    corrected: float | None = None

    @property
    def is_told_from_noise(self) -> bool:
        return self.corrected is not None and self.corrected < 1 - LEVEL


def interval(values: Sequence[float]) -> Interval:
    """Mean and interval of independent values with normal noise (Student's t); at least one value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    low, high = _t_test(values).confidence_interval(LEVEL)
    return Interval(mean, float(low), float(high), n)


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """The same of positive ratios, in whose logarithms the noise is taken for normal."""
    found = interval([math.log(ratio) for ratio in ratios])
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Interval(math.exp(found.mean), low, high, found.n)


def _t_test(values: Sequence[float]) -> Any:
    """SciPy's two-sided t-test that independent values with normal noise have mean 0; at least two values."""
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings():  # of values that are the same but for rounding: then no noise is what is found
        warnings.simplefilter("ignore", RuntimeWarning)
        return ttest_1samp(values, 0.0)


def compare(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """Paired over seeds: what a seed does to both alike (its data order) drops out. None without a common seed."""
    by_seed = {seed: arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())}
    if not by_seed:
        return None
    differences = list(by_seed.values())
    return Comparison(interval(differences), by_seed, paired_p(differences))


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t-test that these differences have mean 0; None for one difference."""
    if len(differences) == 1:
        return None
    return float(_t_test(differences).pvalue) if any(differences) else 1.0  # the same to the last digit


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: with k comparisons at once, at most 1 − LEVEL of sweeps without any difference show one.

    Args:
        ps: uncorrected; None where nothing was tested, which counts for no comparison
    """
    tested = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[i] = largest
    return corrected


Curve = Sequence[tuple[float, float]]  # (tokens, loss), tokens rising


def first_reached(curve: Curve, target: float) -> float | None:
    """Tokens after which a loss is first at ``target`` or below, linear between measurements; None if it never is."""
    before: tuple[float, float] | None = None
    for tokens, loss in curve:
        if loss <= target:
            if before is None:
                return tokens
            part = (before[1] - target) / (before[1] - loss)
            return before[0] + part * (tokens - before[0])
        if math.isfinite(loss):
            before = (tokens, loss)
    return None


def speed_up(arm: Curve, baseline: Curve) -> float | None:
    """How many times fewer tokens the arm needs than the baseline: 2 for half of them, 0.5 for twice as many.

    Both are asked for the higher one of the two final losses: the baseline's where the arm is better, else the arm's,
    so that nothing is extrapolated. None without a curve.
    """
    if not arm or not baseline or not math.isfinite(arm[-1][1] + baseline[-1][1]):
        return None
    target = max(arm[-1][1], baseline[-1][1])
    ours, theirs = first_reached(arm, target), first_reached(baseline, target)
    return theirs / ours if ours and theirs else None
