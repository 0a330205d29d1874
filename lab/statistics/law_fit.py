"""The fit of a ladder's law, by generalised least squares, and what it estimates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from blockwright.lab.statistics.intervals import LEVEL
from blockwright.lab.statistics.law import (
    SHAPE,
    Array,
    Common,
    Form,
    Ladder,
    Rung,
    RungNoise,
    arranged,
    gains_of,
    independent,
    largest,
    noise_of,
    on_one_thread,
    predict,
)

EXPONENTS = (0.02, 3.0)  # bounds of α and β
FLOOR = (1e-3, 50.0)  # bounds of E in nats
FEWEST = 4  # pairs of size and seed, with fewer of which there is no interval
FIRST, LAST = 15, 200  # evaluations from each start, and from the best of where these lead


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error.

    Args:
        mean: the value
        se: its standard error; infinite if the data do not fix it
        dof: degrees of freedom of the standard error; below 1: no interval
    """

    mean: float
    se: float
    dof: float

    @property
    def half(self) -> float:
        """Half the width of its interval at ``LEVEL``."""
        return t_quantile(self.dof) * self.se

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def p(self, value: float) -> float:
        """Two-sided p of the test that the truth is ``value``; 1 without an interval."""
        from scipy.stats import t

        if self.dof < 1 or not self.se < math.inf or self.mean == value:
            return 1.0
        return float(2 * t.sf(abs(self.mean - value) / self.se, self.dof)) if self.se else 0.0


def t_quantile(dof: float) -> float:
    """The two-sided quantile of Student's t at ``LEVEL``."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, dof)) if dof >= 1 else math.inf


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Args:
        ladder: what it was fitted to
        theta: its parameters, as of ``predict``
        noise: by which its residuals are whitened
        jacobian: whitened, at ``theta``
        cost: sum of the squared whitened residuals
    """

    ladder: Ladder
    theta: Array
    noise: RungNoise
    jacobian: Array
    cost: float

    @property
    def floor(self) -> float:
        """E, in nats."""
        return math.exp(self.theta[0])

    @property
    def exponents(self) -> tuple[float, float]:
        """α and β."""
        return math.exp(self.theta[3]), math.exp(self.theta[4])

    @property
    def condition(self) -> float:
        """Condition number of the Jacobian with columns of length 1."""
        return float(np.linalg.cond(self._scaled()[0]))

    @property
    def is_at_bound(self) -> bool:
        """Whether the floor or an exponent is at a bound, so that the data do not fix it."""
        values = zip((self.floor, *self.exponents), (FLOOR, EXPONENTS, EXPONENTS), strict=True)
        return any(value < 1.05 * low or value > high / 1.05 for value, (low, high) in values)

    @property
    def residuals(self) -> Array:
        """Measured minus the law, in nats, a value for each rung."""
        ladder = self.ladder
        return ladder.losses - predict(self.theta, ladder.n, ladder.d, ladder.size_gain, ladder.data_gain)[0]

    def _scaled(self) -> tuple[Array, Array]:
        lengths = np.linalg.norm(self.jacobian, axis=0)
        lengths[lengths == 0] = 1.0
        return self.jacobian / lengths, lengths

    @cached_property
    def _inverse(self) -> Array:
        """[parameters, rungs], the pseudo-inverse of the whitened Jacobian."""
        scaled, lengths = self._scaled()
        return np.asarray(np.linalg.pinv(scaled, rcond=1e-9) / lengths[:, None])

    def covariance(self) -> Array:
        """Of the parameters."""
        root = self._inverse
        return root @ root.T

    def weights(self, gradient: Array) -> Array:
        """By which the losses of the rungs enter gradient · θ."""
        return gradient @ self._inverse @ self.noise.whitening

    def estimate(self, mean: float, gradient: Array) -> Estimate:
        """A value with a standard error by the delta method."""
        variance, dof = self.noise.of(self.weights(gradient))
        se = math.sqrt(variance) if variance >= 0 else math.inf  # NaN of a place beyond any
        return Estimate(mean, se, dof if self.ladder.trunks >= FEWEST else 0.0)

    def speed_up(self, arm: str) -> Estimate:
        """log s of an arm, at the best split of the compute: s = ρ_N ρ_D."""
        size, data = self.gains(arm)
        gradient = np.concatenate([np.zeros(SHAPE), size + data])
        return self.estimate(float(gradient @ self.theta), gradient)

    def gains(self, arm: str) -> tuple[Array, Array]:
        """The rows that give log ρ_N and log ρ_D of an arm from the gains."""
        size, data = gains_of(self.ladder.arms, [arm], self.ladder.form)
        return size[0], data[0]

    def apart(self, arm: str) -> tuple[Estimate, Estimate]:
        """log ρ_N and log ρ_D of an arm; poorly told apart (correlation −.9), so report s first."""
        rows = [np.concatenate([np.zeros(SHAPE), row]) for row in self.gains(arm)]
        size, data = (self.estimate(float(row @ self.theta), row) for row in rows)
        return size, data

    def loss(self, arm: str, parameters: float, tokens: float) -> Estimate:
        """Forecast of the mean loss of an arm, in nats; of one training, the noise of a seed comes on top."""
        size, data = self.gains(arm)
        n, d = self.place(parameters, tokens)
        losses, jacobian = predict(self.theta, n, d, size[None], data[None])
        return self.estimate(float(losses[0]), jacobian[0])

    def place(self, parameters: float, tokens: float) -> tuple[Array, Array]:
        """n and d of a rung."""
        center = self.ladder.center
        return np.array([math.log(parameters) - center[0]]), np.array([math.log(tokens) - center[1]])


@on_one_thread
def fit(rungs: Sequence[Rung], baseline: str, form: Form = "apart", common: Sequence[Common] = ()) -> Fit:
    """Fit the law by generalised least squares.

    Args:
        rungs: of all arms
        baseline: the arm whose ρ are 1
        form: ``apart``: ρ_N and ρ_D for each arm; ``alike``: one s
        common: what tuning leaves
    """
    ladder = arranged(rungs, baseline, form, common)
    first = minimise(ladder, independent(len(rungs)), starts(ladder))
    return minimise(ladder, noise_of(rungs, first.jacobian, first.residuals, common), [first.theta])


def minimise(ladder: Ladder, noise: RungNoise, begin: Sequence[Array]) -> Fit:
    """The best of the local minima of the squared whitened residuals.

    Args:
        ladder: the rungs
        noise: theirs
        begin: parameters to start from
    """
    from scipy.optimize import least_squares

    white = noise.whitening
    target = white @ ladder.losses
    place = ladder.n, ladder.d, ladder.size_gain, ladder.data_gain

    def residual(theta: Array) -> Array:
        return white @ predict(theta, *place)[0] - target

    def slope(theta: Array) -> Array:
        return white @ predict(theta, *place)[1]

    bounds = np.full((2, ladder.number), [[-math.inf], [math.inf]])
    bounds[:, [0, 3, 4]] = np.log([FLOOR, EXPONENTS, EXPONENTS]).T

    def descend(start: Array, evaluations: int) -> Any:
        return least_squares(residual, start, slope, bounds, x_scale="jac", max_nfev=evaluations)

    nearest = min((descend(start, FIRST) for start in begin), key=lambda each: each.cost)
    best = descend(nearest.x, LAST)
    return Fit(ladder, best.x, noise, slope(best.x), 2 * best.cost)


def starts(ladder: Ladder) -> list[Array]:
    """Twelve starts: E a share of the lowest loss, both exponents low or high, and no gains."""
    lowest, mean, gains = ladder.losses.min(), ladder.losses.mean(), np.zeros(ladder.number - SHAPE)
    found = []
    for share, alpha, beta in itertools.product((0.4, 0.7, 0.9), (0.2, 0.5), (0.2, 0.5)):
        term = math.log(max(mean - share * lowest, 1e-3) / 2)
        shape = [math.log(share * lowest), term, term, math.log(alpha), math.log(beta)]
        found.append(np.concatenate([shape, gains]))
    return found


# --- speed-ups and splits of the compute by a fitted law --------------------------------------------------------------


Line = Literal["data", "ratio", "size"]
LINES: dict[Line, tuple[float, float]] = {"data": (0.0, 1.0), "ratio": (0.5, 0.5), "size": (1.0, 0.0)}
DRAWS, SEED = 4000, 0  # of the law's parameters, for an interval along a line
REACH = 2.0  # times beyond the rungs, in size and in tokens, to which a law is trusted
FARTHEST = 12.0  # log of the largest speed-up along a line; beyond, the baseline does not get there


@dataclass(frozen=True, eq=False)
class Range:
    """An estimate and its interval at ``LEVEL``; infinite where the baseline never reaches the arm's loss.

    Args:
        mean, low, high: of the speed-up
        draws: of it, from the law's uncertain parameters; empty without an interval
    """

    mean: float
    low: float
    high: float
    draws: Array

    def p(self, value: float) -> float:
        """Two-sided p of the test that the truth is ``value``, at least 1 / ``DRAWS``; 1 without an interval."""
        if not len(self.draws):
            return 1.0
        below, above = (self.draws <= value).mean(), (self.draws >= value).mean()
        return float(min(1.0, max(2 * min(below, above), 1 / len(self.draws))))


def speed_up_along(fit: Fit, arm: str, parameters: float, tokens: float, line: Line) -> Range:
    """How many times the compute the baseline needs for the loss of an arm, if it is spent along a line.

    Solves L_baseline(c^x N, c^y D) = L_arm(N, D) for c, for each draw of the law's parameters.

    Args:
        fit: of both
        arm: that is at (N, D)
        parameters, tokens: N and D
        line: ``data``: the same size, more tokens; ``ratio``: the same tokens per parameter; ``size``: the same tokens
    """
    dof = fit.speed_up(arm).dof
    draws = np.vstack([fit.theta, _draws(fit, max(dof, 1.0))])
    n, d = fit.place(parameters, tokens)
    goal = _losses(draws, n + draws[:, SHAPE:] @ fit.gains(arm)[0], d + draws[:, SHAPE:] @ fit.gains(arm)[1])
    x, y = LINES[line]
    low, high = np.full(len(draws), -FARTHEST), np.full(len(draws), FARTHEST)
    for _ in range(50):
        middle = (low + high) / 2
        is_worse = _losses(draws, n + x * middle, d + y * middle) > goal
        low, high = np.where(is_worse, middle, low), np.where(is_worse, high, middle)
    found = np.where(high >= FARTHEST, math.inf, np.exp((low + high) / 2))
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low_end, high_end = np.quantile(found[1:], ends, method="nearest") if dof >= 1 else (0.0, math.inf)
    return Range(float(found[0]), float(low_end), float(high_end), found[1:] if dof >= 1 else found[:0])


def _draws(fit: Fit, dof: float) -> Array:
    """Parameters from a multivariate t distribution about the fitted ones, with a fixed seed."""
    chance = np.random.default_rng(SEED)
    normal = chance.multivariate_normal(np.zeros(len(fit.theta)), fit.covariance(), DRAWS, method="svd")
    spread = np.sqrt(dof / chance.chisquare(dof, DRAWS))
    return fit.theta + normal * spread[:, None]


def _losses(theta: Array, n: Array, d: Array) -> Array:
    """The law for many parameter vectors, at a place each."""
    floor, alpha, beta = np.exp(np.clip(theta[:, [0, 3, 4]], -20, 20)).T
    powers = np.clip([theta[:, 1] - alpha * n, theta[:, 2] - beta * d], -50, 50)
    return floor + np.exp(powers[0]) + np.exp(powers[1])


def best_split(fit: Fit, flops: float) -> tuple[float, float]:
    """N and D of the baseline with the lowest loss at 6ND training FLOPs.

    Where dL/dlog N = dL/dlog D, that is α A N^−α = β B D^−β with log N + log D fixed.

    Args:
        fit: of the law
        flops: 6ND
    """
    a, b, (alpha, beta) = fit.theta[1], fit.theta[2], fit.exponents
    total = math.log(flops / 6) - sum(fit.ladder.center)
    n = (a - b + math.log(alpha / beta) + beta * total) / (alpha + beta)
    return math.exp(n + fit.ladder.center[0]), math.exp(total - n + fit.ladder.center[1])


def spans_best_split(fit: Fit) -> bool:
    """Whether the best split of the compute of some rung lies among the rungs, or within ``REACH`` of them.

    ρ_N ρ_D is the speed-up there. Of rungs with far fewer tokens per parameter it is an extrapolation: an arm that was
    equal within 0.012 nats over all rungs of a real ladder had ρ_N 0.50, ρ_D 1.33 and a product of 0.66 (0.45 to 0.96).
    """
    places = [(rung.parameters, rung.tokens) for rung in fit.ladder.rungs]
    ends = [(min(of) / REACH, max(of) * REACH) for of in zip(*places, strict=True)]
    splits = (best_split(fit, 6 * parameters * tokens) for parameters, tokens in places)
    return any(all(low <= x <= high for x, (low, high) in zip(split, ends, strict=True)) for split in splits)


def shown(fit: Fit, arm: str) -> Estimate:
    """log s of an arm where the ladder shows it: at the best split if its rungs span that, else at the largest rung."""
    return fit.speed_up(arm) if spans_best_split(fit) else at_largest(fit, arm)


def at_largest(fit: Fit, arm: str) -> Estimate:
    """log s of an arm at the tokens per parameter of the largest rung, to first order.

    Size and data count by what more of them would still gain: (2 / (a + b)) (a log ρ_N + b log ρ_D), with
    a = α A N^−α and b = β B D^−β. At the best split a = b, and s = ρ_N ρ_D.
    """
    rung = largest(fit.ladder.rungs)
    n, d = fit.place(rung.parameters, rung.tokens)
    alpha, beta = fit.exponents
    a, b = alpha * np.exp(fit.theta[1] - alpha * n), beta * np.exp(fit.theta[2] - beta * d)
    size, data = fit.gains(arm)
    gradient = np.concatenate([np.zeros(SHAPE), 2 * (a * size + b * data) / (a + b)])
    return fit.estimate(float(gradient @ fit.theta), gradient)


def pinned_speed_up(worse: float, better: float, floor: float, exponent: float) -> float:
    """s of the law L(C) = L∞ + A C^−α with both constants pinned: ((L_worse − L∞) / (L_better − L∞))^(1/α).

    The identity by which Marin's experiments are read (github.com/marin-community/marin, issue 8096): A cancels, and
    the budget with it. It has no interval, and is as right as its constants.

    Args:
        worse, better: losses in nats at one budget
        floor: L∞ in nats, below both losses
        exponent: α
    """
    return float(((worse - floor) / (better - floor)) ** (1 / exponent))
