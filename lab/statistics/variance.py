"""Noise of a comparison: from its own pairs, pooled over all arms of a sweep, or with a bank of earlier sweeps.

A seed moves all arms alike (its data order, its shared initial weights), so that the difference of two arms of a seed
varies less than either. ``Noise.sd`` is of that paired difference. With three seeds its estimate has two degrees of
freedom, and Student's t then asks for 4.3 standard errors; the functions here find more degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

UNEQUAL = 4.0  # largest residual variance of an arm / the median, above which arms are not pooled
DOUBTFUL = 0.90  # point of F above which a sweep is noisier than its bank
ENOUGH = 30  # degrees of freedom of its own, at which Student's t is 4 % above the normal: a bank has little to add

Source = Literal["paired", "pooled", "bank"]


@dataclass(frozen=True)
class Left:
    """Variance of a loss, or of a difference of two, that seeds do not lessen: of what tuning leaves.

    Args:
        variance: in the squared unit of the values
        dof: degrees of freedom of its estimate
    """

    variance: float = 0.0
    dof: float = math.inf

    def __add__(self, other: Left) -> Left:
        """Of independent ones; degrees of freedom by Welch and Satterthwaite."""
        return Left(self.variance + other.variance, satterthwaite(self, other))


def satterthwaite(*parts: Left) -> float:
    """(Σ v)² / Σ v²/ν, degrees of freedom of a sum of variances (Welch 1947, doi 10.1093/biomet/34.1-2.28)."""
    total = math.fsum(each.variance for each in parts)
    if not total:
        return math.inf
    if any(each.dof <= 0 for each in parts):  # of one seed
        return 0.0
    return 1 / max(math.fsum((each.variance / total) ** 2 / each.dof for each in parts), 1e-300)


@dataclass(frozen=True)
class Noise:
    """Standard deviation of a paired difference of two arms, one value a seed.

    Args:
        sd: estimate, in the unit of the values
        dof: degrees of freedom of the estimate
        source: paired: of the differences themselves; pooled: of all arms; bank: with earlier sweeps
        left: what the tuning of both arms leaves in their difference
    """

    sd: float
    dof: float
    source: Source
    left: Left = Left()

    def error(self, n: int) -> float:
        """Standard error of the mean of ``n`` paired differences, with what tuning leaves."""
        return math.hypot(self.sd / math.sqrt(n), math.sqrt(self.left.variance))

    def dof_of_error(self, n: int) -> float:
        """Degrees of freedom of ``error``: at most those of the noise, so that what tuning leaves lessens no p."""
        if self.dof <= 0 or not self.left.variance:
            return self.dof
        share = (self.sd / math.sqrt(n) / self.error(n)) ** 2  # squares of shares do not overflow
        return min(self.dof, satterthwaite(Left(share, self.dof), Left(1 - share, self.left.dof)))

    def half(self, n: int, level: float) -> float:
        """Half the width of the interval of the mean of ``n`` differences at this confidence (Student's t)."""
        from scipy.special import stdtrit

        return float(stdtrit(self.dof_of_error(n), (1 + level) / 2)) * self.error(n)

    def p(self, mean: float, n: int) -> float:
        """Two-sided p of the test that the differences have mean 0, after ``mean`` of ``n`` was seen."""
        from scipy.special import stdtr

        if mean == 0:
            return 1.0
        error = self.error(n)
        return 2 * float(stdtr(self.dof_of_error(n), -abs(mean) / error)) if error else 0.0


def paired(differences: Sequence[float]) -> Noise | None:
    """From the differences of two arms themselves; None for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    return Noise(math.hypot(*(d - mean for d in differences)) / math.sqrt(n - 1), n - 1, "paired")


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
    norms, count = _residual_norms(table)
    arms = len(norms)
    if arms < 3 or count < 2 or max(norms.values()) > math.sqrt(UNEQUAL) * median(norms.values()):
        return None
    dof = dof_of(arms, count)
    return Noise(math.hypot(*norms.values()) * math.sqrt(2 / dof), dof, "pooled")


def of_each_arm(table: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Standard deviation of each arm over seeds, without what a seed does to all arms alike.

    It shows the gain of an option against noise. Grubbs 1948, doi 10.1214/aoms/1177730261: with residuals r of the
    table of A arms and S common seeds,

        q_a = Σ r² / (S − 1),    v_a = A / (A − 2) (q_a − Σ q / (A (A − 1)))

    Args:
        table: as of ``pooled``

    Returns:
        arm → σ, 0 where the estimate is below it; empty for fewer than three arms or seeds
    """
    norms, count = _residual_norms(table)
    arms = len(norms)
    if arms < 3 or count < 3:
        return {}
    roots = {name: norm / math.sqrt(count - 1) for name, norm in norms.items()}
    total = math.hypot(*roots.values()) / math.sqrt(arms * (arms - 1))
    scale = math.sqrt(arms / (arms - 2))  # of q − total as (√q − √total)(√q + √total), which does not overflow
    return {name: scale * math.sqrt(max(q - total, 0.0)) * math.sqrt(q + total) for name, q in roots.items()}


def _residual_norms(table: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], int]:
    """Arm → √Σ r² after the means of arms and of seeds are removed, and the number of common seeds.

    ``hypot`` does not overflow, whatever a diverging run has left.
    """
    rows = {name: row for name, row in table.items() if row}
    seeds = sorted(set.intersection(*(set(row) for row in rows.values()))) if rows else []
    if not seeds:
        return dict.fromkeys(rows, 0.0), 0
    of_seed = [math.fsum(row[seed] for row in rows.values()) / len(rows) for seed in seeds]
    norms = {}
    for name, row in rows.items():
        residuals = [row[seed] - mean for seed, mean in zip(seeds, of_seed, strict=True)]
        of_arm = math.fsum(residuals) / len(seeds)
        norms[name] = math.hypot(*(residual - of_arm for residual in residuals))
    return norms, len(seeds)


def dof_of(arms: int, seeds: int) -> int:
    """(A − 1)(S − 1), the degrees of freedom of a variance pooled over arms; of two arms, that of their pairs."""
    return (arms - 1) * max(seeds - 1, 0)


def with_bank(own: Noise, bank: Noise) -> Noise:
    """This sweep's noise with that of earlier sweeps of the same shape, length and rate.

        v = (d s² + d₀ s₀²) / (d + d₀)

    ``own`` if it has 30 degrees of freedom: of noisier sweeps a bank would then only hide differences. The guard: also
    if s²/s₀² is above the 90 % point of F(d, d₀), since quieter sweeps make differences out of noise. With 3 seeds
    and d₀ = 12, sweeps twice as noisy call equal arms different in 13 %, and in 23 % without the guard. It costs power:
    to see 2 sd, .81 instead of .90; the 3 seeds alone have .47.
    """
    from scipy.special import fdtri

    if own.dof >= ENOUGH or own.sd > math.sqrt(float(fdtri(own.dof, bank.dof, DOUBTFUL))) * bank.sd:
        return own
    dof = own.dof + bank.dof
    return Noise(math.hypot(math.sqrt(own.dof / dof) * own.sd, math.sqrt(bank.dof / dof) * bank.sd), dof, "bank")
