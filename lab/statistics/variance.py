"""Noise of a comparison: from its own pairs, pooled over all arms of a sweep, or with a bank of earlier sweeps.

A seed moves all arms alike (its data order, its shared initial weights), so that the difference of two arms of a seed
varies less than either. ``Noise.sd`` is of that paired difference. With three seeds its estimate has two degrees of
freedom, and Student's t then asks for 4.3 standard errors; the functions here find more degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

UNEQUAL = 4.0  # largest residual variance of an arm / the median, above which arms are not pooled
DOUBTFUL = 0.90  # point of F above which a sweep is noisier than its bank

Source = Literal["paired", "pooled", "bank"]


@dataclass(frozen=True)
class Noise:
    """Standard deviation of a paired difference of two arms, one value a seed.

    Args:
        sd: estimate, in the unit of the values
        dof: degrees of freedom of the estimate
        source: paired: of the differences themselves; pooled: of all arms; bank: with earlier sweeps
    """

    sd: float
    dof: float
    source: Source

    def error(self, n: int) -> float:
        """Standard error of the mean of ``n`` paired differences."""
        return self.sd / math.sqrt(n)

    def half(self, n: int, level: float) -> float:
        """Half the width of the interval of the mean of ``n`` differences at this confidence (Student's t)."""
        from scipy.special import stdtrit

        return float(stdtrit(self.dof, (1 + level) / 2)) * self.error(n)

    def p(self, mean: float, n: int) -> float:
        """Two-sided p of the test that the differences have mean 0, after ``mean`` of ``n`` was seen."""
        from scipy.special import stdtr

        if mean == 0:
            return 1.0
        return 2 * float(stdtr(self.dof, -abs(mean) / self.error(n))) if self.sd else 0.0


def paired(differences: Sequence[float]) -> Noise | None:
    """From the differences of two arms themselves; None for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    return Noise(math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1)), n - 1, "paired")


def pooled(table: Mapping[str, Mapping[int, float]]) -> Noise | None:
    """From the residuals r of all arms × common seeds, after the means of arms and of seeds are removed.

        v = Σ r² / ((A − 1)(S − 1)),    sd = √(2 v),    dof = (A − 1)(S − 1)

    This assumes that all arms are equally noisy. If the baseline alone is twice as noisy as the others, 8 % of sweeps
    of equal arms instead of 5 % call a difference; if four times, up to 10 %, and 17 % without the guard. Of three arms
    the guard sees nothing: there the largest is at most 4 × the median.

    Args:
        table: arm → seed → value; arms without a value are left out, and so are seeds that an arm lacks

    Returns:
        None if the guard refuses (the largest residual variance of an arm is above 4 × the median), or for fewer than
        three arms or two common seeds, where nothing is gained.
    """
    rows = [row for row in table.values() if row]
    seeds = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
    arms, count = len(rows), len(seeds)
    if arms < 3 or count < 2:
        return None
    of_seed = [math.fsum(row[seed] for row in rows) / arms for seed in seeds]
    squares = [_residual_squares([row[s] - m for s, m in zip(seeds, of_seed, strict=True)]) for row in rows]
    if max(squares) > UNEQUAL * _median(squares):
        return None
    dof = (arms - 1) * (count - 1)
    return Noise(math.sqrt(2 * math.fsum(squares) / dof), dof, "pooled")


def _residual_squares(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def with_bank(own: Noise, bank: Noise) -> Noise:
    """This sweep's noise with that of earlier sweeps of the same shape, length and rate.

        v = (d s² + d₀ s₀²) / (d + d₀)

    The guard: ``own`` if s²/s₀² is above the 90 % point of F(d, d₀), since a bank of quieter sweeps makes differences
    out of noise. With 3 seeds and d₀ = 12, sweeps twice as noisy call equal arms different in 13 %, and in 23 % without
    the guard. It costs power: to see 2 sd, .81 instead of .90; the 3 seeds alone have .47.
    """
    from scipy.special import fdtri

    if own.sd**2 > float(fdtri(own.dof, bank.dof, DOUBTFUL)) * bank.sd**2:
        return own
    dof = own.dof + bank.dof
    return Noise(math.sqrt((own.dof * own.sd**2 + bank.dof * bank.sd**2) / dof), dof, "bank")
