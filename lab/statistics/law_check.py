"""What a planned ladder will see, and whether a measured law may be believed.

The second asks what the rungs can identify, whether the law fits, and whether it forecasts.

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
from numpy.typing import NDArray

from blockwright.lab.statistics.law import (
    SHAPE,
    Array,
    Common,
    Form,
    Rung,
    RungNoise,
    arranged,
    estimated,
    known_of,
    noise_of,
    on_one_thread,
    predict,
    shares,
)
from blockwright.lab.statistics.law_fit import Estimate, Fit, fit, minimise, shown, starts
from blockwright.lab.statistics.variance import Left

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
        return _is_wrong(self.lack_of_fit)

    @property
    def misses_largest(self) -> bool:
        return self.left_out is not None and self.left_out.excludes_zero

    @property
    def forecasts(self) -> bool:
        """Whether the law may be asked for the loss of a larger size."""
        return not (self.is_wrong or self.misses_largest or self.fit.is_at_bound or self.why_alike)


@on_one_thread
def conclude(rungs: Sequence[Rung], baseline: str, common: Sequence[Common] = ()) -> Conclusion:
    """Fit the law of a ladder, and check it.

    Args:
        rungs: of all arms, without lost ones
        baseline: the arm whose ρ are 1
        common: what tuning leaves
    """
    why = unidentified(rungs)
    alike = fit(rungs, baseline, "alike", common)
    found = alike
    if why is None:
        apart = fit(rungs, baseline, "apart", common)
        why = _unsteady(apart, alike)
        found = alike if why else apart
    return Conclusion(found, why, lack_of_fit(found), left_out(found, baseline))


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


def _is_wrong(lack_of_fit: float | None) -> bool:
    return lack_of_fit is not None and lack_of_fit < WRONG


def _unsteady(apart: Fit, alike: Fit) -> Why | None:
    """Why a fit with size and data apart may not be shown."""
    if apart.condition > ILL_CONDITIONED:
        return "condition"
    wide = any(shown(apart, arm).se > TOO_WIDE * alike.speed_up(arm).se for arm in apart.ladder.arms[1:])
    return "width" if wide and not _is_wrong(lack_of_fit(alike)) else None  # arms that do not gain alike have no one s


# --- does it fit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """The cells (arm, size, duration) of a ladder, whose seeds show the noise alone.

    Args:
        number: of cells
        noise: of the rungs
        dof: rungs less cells
        cost: sum of the squared whitened residuals about the cells' means
    """

    number: int
    noise: RungNoise
    dof: int
    cost: float


def cells(rungs: Sequence[Rung], common: Sequence[Common] = ()) -> Cells | None:
    """The noise by the seeds, with what tuning leaves, which all seeds of a cell share; None if no cell has two."""
    keys = [(rung.arm, rung.size, rung.duration) for rung in rungs]
    order = list(dict.fromkeys(keys))
    member = np.array([[float(key == cell) for cell in order] for key in keys])
    dof = len(rungs) - len(order)
    if dof < 1:
        return None
    losses = np.array([rung.loss for rung in rungs])
    noise = noise_of(rungs, member, losses - member @ (member.T @ losses / member.sum(0)), common)
    white = noise.whitening
    means = np.linalg.lstsq(white @ member, white @ losses, rcond=None)[0]
    return Cells(len(order), noise, dof, float(((white @ (losses - member @ means)) ** 2).sum()))


def lack_of_fit(found: Fit) -> float | None:
    """p that the law misses the cells' means by no more than noise.

    F = [(SS_law − SS_cells) / (cells − P)] / [SS_cells / (n − cells)] of residuals whitened by ``cells``.

    Returns:
        p; None if no cell has two seeds, or the law has as many parameters as there are cells
    """
    from scipy.stats import f

    seeds, ladder = cells(found.ladder.rungs, found.ladder.common), found.ladder
    if seeds is None or (free := seeds.number - ladder.number) < 1:
        return None
    law = minimise(ladder, seeds.noise, [found.theta, *starts(ladder)])
    ratio = (law.cost - seeds.cost) / free / (seeds.cost / seeds.dof)
    return float(f.sf(max(ratio, 0.0), free, seeds.dof))


def left_out(found: Fit, baseline: str) -> Estimate | None:
    """Measured minus forecast mean loss of the largest size, from a law that the other sizes give.

    Its standard error is by the delta method at the law of all sizes, which is the better known if that law is true.
    At the law of the others, 1 to 2 % more of true laws would be flagged.

    Args:
        found: the law of all sizes
        baseline: the arm whose ρ are 1

    Returns:
        in nats, with the noise of its rungs in its standard error; None if the other sizes fix no law, or without seeds
    """
    rungs, by_size = found.ladder.rungs, defaultdict[str, list[Rung]](list)
    for rung in rungs:
        by_size[rung.size].append(rung)
    largest = max(by_size, key=lambda size: by_size[size][0].parameters)
    rest, away = [rung for rung in rungs if rung.size != largest], by_size[largest]
    seeds = cells(rungs, found.ladder.common)
    if seeds is None or not rest or unidentified(rest) or {r.arm for r in rest} != {r.arm for r in rungs}:
        return None
    inside, outside = (np.flatnonzero([(rung.size != largest) == side for rung in rungs]) for side in (True, False))
    noise = seeds.noise.among(inside)
    ladder = arranged(rest, baseline, found.ladder.form)
    off = float(np.mean([rung.loss for rung in away])) - _mean_forecast(minimise(ladder, noise, starts(ladder)), away)
    weights = np.zeros(len(rungs))
    weights[inside], weights[outside] = -_weights(found, noise, inside, outside), 1 / len(away)
    variance, dof = seeds.noise.of(weights)
    return Estimate(off, math.sqrt(variance), dof)


def _mean_forecast(law: Fit, away: Sequence[Rung]) -> float:
    """Mean loss of some rungs by the law of others."""
    return math.fsum(law.loss(rung.arm, rung.parameters, rung.tokens).mean for rung in away) / len(away)


def _weights(found: Fit, noise: RungNoise, inside: NDArray[np.intp], outside: NDArray[np.intp]) -> Array:
    """By which the losses of the rungs inside enter the mean forecast of those outside."""
    ladder = found.ladder
    slope = predict(found.theta, ladder.n, ladder.d, ladder.size_gain, ladder.data_gain)[1]
    white = noise.whitening
    return np.asarray(slope[outside].mean(0) @ np.linalg.pinv(white @ slope[inside], rcond=1e-9) @ white)


@dataclass(frozen=True)
class Usual:
    """A law and its noise as small models of text have them, to plan with.

    Args:
        floor: E, in nats
        of_size, of_data: the terms at 1e6 parameters and at 4e6 tokens, in nats
        exponent: α and β
        noise: standard deviation of a training, in nats
        pairing, trunk: shares of its variance that the arms of a seed, and the durations of a trunk, have in common
        tuning, tuning_dof: standard deviation of what tuning leaves in an arm at a size, in nats, and the degrees of
            freedom with which its tries say so; of ``blockwright ladder attention`` 0.0011 to 0.0046 nats, median 0.002
    """

    floor: float = 1.1
    of_size: float = 0.2
    of_data: float = 0.4
    exponent: float = 0.35
    noise: float = 0.007
    pairing: float = 0.5
    trunk: float = 0.2
    tuning: float = 0.002
    tuning_dof: int = 3

    @property
    def left(self) -> Left:
        """What tuning leaves."""
        return Left(self.tuning**2, self.tuning_dof)


def expected(rungs: Sequence[Rung], baseline: str, form: Form, usual: Usual, common: Sequence[Common] = ()) -> Estimate:
    """log s of two equal arms, 0, with the standard error that a planned ladder will have, by the delta method.

    At the best split, if the ladder spans it; else at the tokens per parameter of its largest rung.

    Args:
        rungs: planned; their losses do not matter
        baseline, form: as of ``fit``
        usual: the law that is assumed
        common: what tuning will leave; nothing if arms are not tuned
    """
    ladder = arranged(rungs, baseline, form)
    n, d = ladder.center[0] - math.log(1e6), ladder.center[1] - math.log(4e6)
    terms = [math.log(usual.of_size) - usual.exponent * n, math.log(usual.of_data) - usual.exponent * d]
    shape = [math.log(usual.floor), *terms, *[math.log(usual.exponent)] * 2]
    theta = np.concatenate([shape, np.zeros(ladder.number - SHAPE)])
    jacobian = predict(theta, ladder.n, ladder.d, ladder.size_gain, ladder.data_gain)[1]
    parts = np.array([1 - usual.pairing - usual.trunk, usual.pairing, usual.trunk])
    noise = estimated(shares(rungs), usual.noise**2 * parts, jacobian, known_of(rungs, common))
    return shown(Fit(ladder, theta, noise, noise.whitening @ jacobian, 0.0), ladder.arms[1])
