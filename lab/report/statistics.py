"""Statistics over seeds: intervals, paired differences, correction for many comparisons, and speed-up.

Pure functions of numbers. Left out: tests without the assumption of normal noise (they have no power at three seeds),
and variance that seeds do not show: of the held-out text, and of learning rates that were not tried.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95  # confidence level of every interval


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval at ``LEVEL``.

    Args:
        mean: of the values; the geometric one of ratios
        low, high: ends of the interval; None for a single value
        n: number of values
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half its width; for means and differences, whose intervals are symmetric."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline, over the seeds that both have.

    Args:
        difference: arm − baseline
        by_seed: seed → arm − baseline
        p: p-value of the paired t-test; None if undefined
        corrected: p after Holm's correction over all comparisons of the sweep
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
    """``interval`` for positive ratios, assuming normal noise in their logarithms."""
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
    """Paired over seeds, so that common effects of a seed (its data order) cancel. None without a common seed."""
    by_seed = {seed: arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())}
    if not by_seed:
        return None
    differences = list(by_seed.values())
    return Comparison(interval(differences), by_seed, paired_p(differences))


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t-test for mean 0; None for one difference."""
    if len(differences) == 1:
        return None
    return float(_t_test(differences).pvalue) if any(differences) else 1.0  # identical


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for multiple comparisons: bounds the family-wise error rate by 1 − LEVEL.

    Args:
        ps: uncorrected; None for no test, which is not counted
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
    """Tokens at which the loss first reaches ``target``, interpolated linearly.

    None if it never does, or had done so by the first measurement, some unknown number of tokens earlier.
    """
    before: tuple[float, float] | None = None
    for tokens, loss in curve:
        if loss <= target:
            if before is None:
                return None
            part = (before[1] - target) / (before[1] - loss)
            return before[0] + part * (tokens - before[0])
        if math.isfinite(loss):
            before = (tokens, loss)
    return None


def speed_up(arm: Curve, baseline: Curve) -> float | None:
    """Ratio of the tokens that the baseline and the arm need: 2 if the arm needs half as many.

    Measured at the higher of the two final losses, so that nothing is extrapolated. None without a curve, or if one of
    them is below that loss from its first measurement on, as a curve of one measurement always is.
    """
    if not arm or not baseline or not math.isfinite(arm[-1][1] + baseline[-1][1]):
        return None
    target = max(arm[-1][1], baseline[-1][1])
    ours, theirs = first_reached(arm, target), first_reached(baseline, target)
    return theirs / ours if ours and theirs else None
