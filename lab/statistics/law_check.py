"""Whether a ladder's law may be believed: what its rungs can identify, whether it fits, whether it forecasts.

Rules and their limits are by simulation (tests/lab/statistics/test_law_check.py). A law that does not fit gives no
speed-up. One whose shape the rungs do not fix still gives s, if size and data gain alike, but no forecast.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from blockwright.lab.statistics.law import Array, Form, Rung, arranged, predict
from blockwright.lab.statistics.law_fit import Estimate, Fit, fit, minimise, starts, whitening

WRONG = 0.01  # p of the lack-of-fit test; at 5 % it would reject a true law in 8 to 13 % of ladders
ILL_CONDITIONED = 1e4  # condition number of the scaled Jacobian; a ladder that fixes all parameters has 60 to 170
TOO_WIDE = 4.0  # times the interval of s if both gain alike, above which size and data cannot be fitted apart
SIZES = 3  # the fewest that fix the exponent of size; likewise of numbers of tokens
APART = 1.05  # ratio of sizes, or of tokens, above which they are different
DURATIONS = 2  # of each size, without which size and data rise together

Why = Literal["size", "sizes", "durations", "tokens", "condition", "width"]


@dataclass(frozen=True)
class Conclusion:
    """The law of a ladder, and what may be said by it.

    Args:
        fit: with size and data apart where the rungs tell them apart
        why_alike: why size and data are not apart; None if they are
        lack_of_fit: p of the F test against the cells' own means; None without two seeds
        left_out: measured minus forecast of the largest size, in nats, from the other sizes; None below four sizes
    """

    fit: Fit
    why_alike: Why | None
    lack_of_fit: float | None
    left_out: Estimate | None

    @property
    def is_wrong(self) -> bool:
        """Whether one law does not fit these arms, so that there is no speed-up."""
        return self.lack_of_fit is not None and self.lack_of_fit < WRONG

    @property
    def misses_largest(self) -> bool:
        return self.left_out is not None and self.left_out.excludes_zero

    @property
    def forecasts(self) -> bool:
        """Whether the law may be asked for the loss of a larger size."""
        return not (self.is_wrong or self.misses_largest or self.fit.is_at_bound or self.why_alike)


def conclude(rungs: Sequence[Rung], baseline: str) -> Conclusion:
    """Fit the law of a ladder, and check it.

    Args:
        rungs: of all arms, without lost ones
        baseline: the arm whose ρ are 1
    """
    why = unidentified(rungs)
    alike = fit(rungs, baseline, "alike")
    found = alike
    if why is None:
        apart = fit(rungs, baseline, "apart")
        why = _unsteady(apart, alike)
        found = alike if why else apart
    return Conclusion(found, why, lack_of_fit(found), left_out(rungs, baseline, found.ladder.form))


def unidentified(rungs: Sequence[Rung]) -> Why | None:
    """What a ladder lacks to fix the shape of its law, by counting."""
    durations = Counter(size for size, _ in {(rung.size, rung.duration) for rung in rungs})
    sizes, tokens = distinct([rung.parameters for rung in rungs]), distinct([rung.tokens for rung in rungs])
    if sizes == 1:
        return "size"
    if min(durations.values()) < DURATIONS:
        return "durations"
    if sizes < SIZES:
        return "sizes"
    return "tokens" if tokens < SIZES else None


def distinct(values: Sequence[float]) -> int:
    """The number of values that differ by more than ``APART``, which matched arms of one size do not."""
    return 1 + sum(b > a * APART for a, b in pairwise(sorted(values)))


def _unsteady(apart: Fit, alike: Fit) -> Why | None:
    """Why a fit with size and data apart may not be shown."""
    if apart.condition > ILL_CONDITIONED:
        return "condition"
    arms = apart.ladder.arms[1:]
    return "width" if any(apart.speed_up(a).se > TOO_WIDE * alike.speed_up(a).se for a in arms) else None


# --- does it fit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """The cells (arm, size, duration) of a ladder, whose seeds show the noise alone.

    Args:
        member: [rungs, cells], 1 where a rung is of a cell
        white: of the noise, by the seeds alone
        variance: of a whitened residual about its cell's mean
        dof: degrees of freedom of the variance
        cost: sum of the squared whitened residuals
    """

    member: Array
    white: Array
    variance: float
    dof: int
    cost: float


def cells(rungs: Sequence[Rung]) -> Cells | None:
    """The noise by the seeds alone; None if no cell has two."""
    keys = [(rung.arm, rung.size, rung.duration) for rung in rungs]
    order = list(dict.fromkeys(keys))
    member = np.array([[float(key == cell) for cell in order] for key in keys])
    dof = len(rungs) - len(order)
    if dof < 1:
        return None
    losses, seeds = np.array([rung.loss for rung in rungs]), member @ member.sum(0)
    unbiased = np.sqrt(seeds / np.maximum(seeds - 1, 1))  # a mean over few seeds takes part of the noise
    white = whitening(rungs, (losses - member @ (member.T @ losses / member.sum(0))) * unbiased)
    means = np.linalg.lstsq(white @ member, white @ losses, rcond=None)[0]
    cost = float(((white @ (losses - member @ means)) ** 2).sum())
    return Cells(member, white, cost / dof, dof, cost)


def lack_of_fit(found: Fit) -> float | None:
    """p that the law misses the cells' means by no more than noise.

    F = [(SS_law − SS_cells) / (cells − P)] / [SS_cells / (n − cells)] of residuals whitened by the seeds alone.

    Returns:
        p; None if no cell has two seeds, or the law has as many parameters as there are cells
    """
    from scipy.stats import f

    noise, ladder = cells(found.ladder.rungs), found.ladder
    if noise is None or (free := noise.member.shape[1] - ladder.number) < 1:
        return None
    law = minimise(ladder, noise.white, [found.theta, *starts(ladder)])
    ratio = (law.cost - noise.cost) / free / noise.variance
    return float(f.sf(max(ratio, 0.0), free, noise.dof))


def left_out(rungs: Sequence[Rung], baseline: str, form: Form) -> Estimate | None:
    """Measured minus forecast mean loss of the largest size, from a law that the other sizes give.

    Args:
        rungs: of all arms
        baseline: the arm whose ρ are 1
        form: of the law

    Returns:
        in nats, with the noise of its rungs in its standard error; None if the other sizes fix no law, or without seeds
    """
    by_size: dict[str, list[Rung]] = defaultdict(list)
    for rung in rungs:
        by_size[rung.size].append(rung)
    largest = max(by_size, key=lambda size: by_size[size][0].parameters)
    rest = [rung for rung in rungs if rung.size != largest]
    noise, away = cells(rungs), by_size[largest]
    if noise is None or not rest or unidentified(rest) or {r.arm for r in rest} != {r.arm for r in rungs}:
        return None
    inside, outside = (np.flatnonzero([(rung.size != largest) == side for rung in rungs]) for side in (True, False))
    covariance = np.linalg.inv(noise.white.T @ noise.white)
    white = np.linalg.inv(np.linalg.cholesky(covariance[np.ix_(inside, inside)]))
    expected, of_law = _mean_forecast(rest, away, white, baseline, form)
    off = float(np.mean([rung.loss for rung in away])) - expected
    of_rungs = float(covariance[np.ix_(outside, outside)].mean())
    return Estimate(off, math.sqrt((of_law + of_rungs) * noise.variance), noise.dof)


def _mean_forecast(
    rest: Sequence[Rung], away: Sequence[Rung], white: Array, baseline: str, form: Form
) -> tuple[float, float]:
    """Mean loss of some rungs by the law of others, and its variance over that of a whitened residual."""
    ladder = arranged(rest, baseline, form)
    law = minimise(ladder, white, starts(ladder))
    places = [np.concatenate(law.place(rung.parameters, rung.tokens)) for rung in away]
    gains = [law.gains(rung.arm) for rung in away]
    n, d = np.array(places).T
    expected, jacobian = predict(law.theta, n, d, *(np.array(rows) for rows in zip(*gains, strict=True)))
    slope = jacobian.mean(0)
    return float(expected.mean()), float(slope @ (law.covariance() / law.variance) @ slope)
