"""Statistics over seeds: intervals, paired differences, the correction for many comparisons, and speed-ups.

Pure functions of numbers. Left out: tests without the assumption of normal noise (they have no power at three seeds),
and variance that seeds do not show: of the held-out text, and of learning rates that were not tried.

Of a task that a seed either solves or not, shares of seeds are compared exactly: its figure has two peaks, so that
means and t-tests of it say little. A pair of runs of one seed is no more alike there than any two runs, so that the
seeds are not paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockwright.lab.statistics.variance import Noise, paired

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
        p: of the t-test that the difference is 0; None if undefined: of one seed, of one value at all seeds of both,
            or of differences that show no noise
        corrected: p after Holm's correction over all comparisons of the sweep
        noise: that interval and p are from; None for one seed
    """

    difference: Interval
    by_seed: Mapping[int, float]
    p: float | None
    corrected: float | None = None
    noise: Noise | None = None


def interval(values: Sequence[float]) -> Interval:
    """Mean and interval of independent values with normal noise (Student's t); at least one value."""
    return _around(math.fsum(values) / len(values), len(values), paired(values))


def _around(mean: float, n: int, noise: Noise | None) -> Interval:
    if noise is None:
        return Interval(mean, None, None, n)
    half = noise.half(n, LEVEL)
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """``interval`` for positive ratios, assuming normal noise in their logarithms."""
    of_logarithms = interval([math.log(ratio) for ratio in ratios])
    low, high = (None if end is None else math.exp(end) for end in (of_logarithms.low, of_logarithms.high))
    return Interval(math.exp(of_logarithms.mean), low, high, of_logarithms.n)


def compare(arm: Mapping[int, float], baseline: Mapping[int, float], noise: Noise | None = None) -> Comparison | None:
    """Paired over seeds, so that common effects of a seed (its data order) cancel. None without a common seed.

    Args:
        arm, baseline: seed → value
        noise: of a paired difference, for interval and p; None: that of these pairs
    """
    by_seed = {seed: arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())}
    if not by_seed:
        return None
    n, mean = len(by_seed), math.fsum(by_seed.values()) / len(by_seed)
    noise = noise or paired(list(by_seed.values()))
    one_value = len({side[seed] for side in (arm, baseline) for seed in by_seed}) == 1
    p = None if noise is None or one_value else noise.p(mean, n)
    return Comparison(_around(mean, n, noise), by_seed, p, noise=noise)


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t-test for mean 0; None for one difference."""
    noise = paired(differences)
    return None if noise is None else noise.p(math.fsum(differences) / len(differences), len(differences))


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


# --- Wilson's 95 % interval of a share, which is not empty even where all draws are right, or all wrong ---------------


Z = 1.959964  # of a 95 % interval


def wilson(share: float, n: int) -> tuple[float, float]:
    """The centre and half the width of Wilson's interval, which lies within 0 and 1.

    Wilson 1927, doi 10.1080/01621459.1927.10502953. The share need not be a whole number of n, as SciPy's
    ``binomtest`` requires: a mean of values between 0 and 1 varies no more than draws of 0 or 1, so that the interval
    is as wide as need be, or wider.

    Args:
        share: mean of the draws
        n: number of draws
    """
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    return centre, Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))


@dataclass(frozen=True)
class Share:
    """Seeds that solved the task.

    Args:
        solved, n: of n seeds
        low, high: exact interval at 95 % (Clopper and Pearson 1934, doi 10.1093/biomet/26.4.404)
    """

    solved: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.solved / self.n


@dataclass(frozen=True)
class Solved:
    """Two arms on a task.

    Args:
        ours, theirs: shares
        p: two-sided, of Boschloo's exact test (1970, doi 10.1111/j.1467-9574.1970.tb00104.x) that both are alike
    """

    ours: Share
    theirs: Share
    p: float


def share(outcomes: Mapping[int, bool]) -> Share:
    """Seed → whether it solved the task; at least one seed."""
    from scipy.stats import binomtest

    solved, n = sum(outcomes.values()), len(outcomes)
    ends = binomtest(solved, n).proportion_ci(LEVEL, method="exact")
    return Share(solved, n, float(ends.low), float(ends.high))


def compare_shares(ours: Mapping[int, bool], theirs: Mapping[int, bool]) -> Solved | None:
    """None if an arm has no seed."""
    from scipy.stats import boschloo_exact

    if not ours or not theirs:
        return None
    a, b = share(ours), share(theirs)
    if a.solved + b.solved in (0, a.n + b.n):  # all alike
        return Solved(a, b, 1.0)
    table = [[a.solved, b.solved], [a.n - a.solved, b.n - b.solved]]
    return Solved(a, b, float(boschloo_exact(table).pvalue))


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
