"""One scaling law for all arms of a ladder: a shared shape, and how much further each arm gets with its size and data.

    L_k(N, D) = E + A (ρ_N,k N)^−α + B (ρ_D,k D)^−β        ρ of the baseline is 1

L is the loss in nats of a training whose rate has decayed, N the parameters without embedding and head, D the tokens of
training. The form is that of Hoffmann et al. (2022, arXiv:2203.15556). Shared exponents with factors of each arm are
those of Volkova et al. (2026, arXiv:2602.07712) for optimizers, because a law for each arm alone is ill-conditioned.

An arm has the loss at (N, D) that the baseline has at (ρ_N N, ρ_D D). So at the best split of the compute 6ND into size
and data the arm is faster by s = ρ_N ρ_D, whatever the budget. Lines other than the best split: ``speed_up_along``.

The fit is by least squares from 12 starts, then again with the correlations of the residuals: between the arms of a
seed, which see the same data, and between the durations of a training, which are decays of one trunk. A robust loss is
not needed, since a diverged training is a lost one. Intervals are Student's, with as many values as there are pairs of
size and seed; in simulations they cover .94 to .98 at 95 % (tests/lab/statistics/test_law.py).

Left out, since they cover less: a bootstrap over three seeds (.84), and one over the points of a curve, which are not
independent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Form = Literal["apart", "alike"]
LEVEL = 0.95  # of every interval
SHAPE = 5  # parameters of the law's shape: log E, log of the two terms at the mean rung, log α, log β
EXPONENTS = (0.02, 3.0)  # bounds of α and β
FLOOR = (1e-3, 50.0)  # bounds of E in nats
MOST_CORRELATED = 0.95  # the sum of both correlations of the noise; 1 would be a singular matrix
FIRST, LAST = 15, 200  # evaluations from each start, and from the best of where these lead
DRAWS, SEED = 4000, 0  # of the law's parameters, for an interval along a line
FARTHEST = 12.0  # log of the largest speed-up along a line; beyond, the baseline does not get there


@dataclass(frozen=True)
class Rung:
    """The end of one training.

    Args:
        arm: its name
        size: name of the size, shared by the arms that are matched at it
        duration: name of the duration
        seed: of initialisation and data
        parameters: N, without embedding and head
        tokens: D
        loss: in nats, after the decay
    """

    arm: str
    size: str
    duration: str
    seed: int
    parameters: float
    tokens: float
    loss: float


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
    dof: int

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


def t_quantile(dof: int) -> float:
    """The two-sided quantile of Student's t at ``LEVEL``."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, dof)) if dof >= 1 else math.inf


@dataclass(frozen=True)
class Ladder:
    """Rungs as arrays.

    Args:
        rungs: as given
        arms: their names, the baseline first
        form: ``apart``: each arm has a ρ_N and a ρ_D; ``alike``: ρ_N = ρ_D = √s
        n, d: log N and log D, less ``center``
        center: the means of log N and log D
        size_gain, data_gain: [rungs, gains], which times the gains are log ρ_N and log ρ_D of the rungs
    """

    rungs: tuple[Rung, ...]
    arms: tuple[str, ...]
    form: Form
    n: Array
    d: Array
    center: tuple[float, float]
    size_gain: Array
    data_gain: Array

    @property
    def losses(self) -> Array:
        return np.array([rung.loss for rung in self.rungs])

    @property
    def number(self) -> int:
        """Of parameters."""
        return SHAPE + self.size_gain.shape[1]

    @property
    def trunks(self) -> int:
        """Pairs of size and seed: what is independent."""
        return len({(rung.size, rung.seed) for rung in self.rungs})


def arranged(rungs: Sequence[Rung], baseline: str, form: Form) -> Ladder:
    """Rungs as arrays.

    Args:
        rungs: of all arms
        baseline: the arm whose ρ are 1
        form: see ``Ladder``
    """
    arms = (baseline, *dict.fromkeys(rung.arm for rung in rungs if rung.arm != baseline))
    n, d = (np.log([getattr(rung, name) for rung in rungs]) for name in ("parameters", "tokens"))
    size_gain, data_gain = _gains(arms, [rung.arm for rung in rungs], form)
    center = float(n.mean()), float(d.mean())
    return Ladder(tuple(rungs), arms, form, n - center[0], d - center[1], center, size_gain, data_gain)


def _gains(arms: Sequence[str], of: Sequence[str], form: Form) -> tuple[Array, Array]:
    """The matrices that give log ρ_N and log ρ_D of some arms from the gains of all arms."""
    is_arm = np.array([[float(name == arm) for arm in arms[1:]] for name in of]).reshape(len(of), len(arms) - 1)
    if form == "alike":
        return is_arm / 2, is_arm / 2
    return np.hstack([is_arm, 0 * is_arm]), np.hstack([0 * is_arm, is_arm])


def predict(theta: Array, n: Array, d: Array, size_gain: Array, data_gain: Array) -> tuple[Array, Array]:
    """Losses of the law, and their derivatives by its parameters.

    Args:
        theta: log E, the logs of both terms at n = d = 0, log α, log β, the gains
        n, d, size_gain, data_gain: as in ``Ladder``
    """
    floor, alpha, beta = np.exp(theta[[0, 3, 4]])
    size, data = n + size_gain @ theta[SHAPE:], d + data_gain @ theta[SHAPE:]
    of_size, of_data = np.exp(theta[1] - alpha * size), np.exp(theta[2] - beta * data)
    shape = [np.full_like(n, floor), of_size, of_data, -alpha * of_size * size, -beta * of_data * data]
    gains = -(alpha * of_size)[:, None] * size_gain - (beta * of_data)[:, None] * data_gain
    return floor + of_size + of_data, np.column_stack([*shape, gains])


# --- the fit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Args:
        ladder: what it was fitted to
        theta: its parameters, as of ``predict``
        jacobian: whitened, at ``theta``
        variance: of a whitened residual
        cost: sum of the squared whitened residuals
    """

    ladder: Ladder
    theta: Array
    jacobian: Array
    variance: float
    cost: float

    @property
    def dof(self) -> int:
        """Of the intervals."""
        return self.ladder.trunks - 3

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

    def covariance(self) -> Array:
        """Of the parameters."""
        scaled, lengths = self._scaled()
        root = np.linalg.pinv(scaled, rcond=1e-9) / lengths[:, None]
        return root @ root.T * self.variance

    def estimate(self, mean: float, gradient: Array) -> Estimate:
        """A value with a standard error by the delta method."""
        return Estimate(mean, math.sqrt(max(float(gradient @ self.covariance() @ gradient), 0.0)), self.dof)

    def speed_up(self, arm: str) -> Estimate:
        """log s of an arm, at the best split of the compute: s = ρ_N ρ_D."""
        size, data = self.gains(arm)
        gradient = np.concatenate([np.zeros(SHAPE), size + data])
        return self.estimate(float(gradient @ self.theta), gradient)

    def gains(self, arm: str) -> tuple[Array, Array]:
        """The rows that give log ρ_N and log ρ_D of an arm from the gains."""
        size, data = _gains(self.ladder.arms, [arm], self.ladder.form)
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


def fit(rungs: Sequence[Rung], baseline: str, form: Form = "apart") -> Fit:
    """Fit the law by generalised least squares.

    Args:
        rungs: of all arms
        baseline: the arm whose ρ are 1
        form: ``apart``: ρ_N and ρ_D for each arm; ``alike``: one s
    """
    ladder = arranged(rungs, baseline, form)
    first = minimise(ladder, np.eye(len(rungs)), starts(ladder))
    return minimise(ladder, whitening(ladder.rungs, first.residuals), [first.theta])


def minimise(ladder: Ladder, white: Array, begin: Sequence[Array]) -> Fit:
    """The best of the local minima of the squared whitened residuals.

    Args:
        ladder: the rungs
        white: of ``whitening``
        begin: parameters to start from
    """
    from scipy.optimize import least_squares

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
    free = max(len(ladder.rungs) - ladder.number, 1)
    return Fit(ladder, best.x, slope(best.x), 2 * best.cost / free, 2 * best.cost)


def starts(ladder: Ladder) -> list[Array]:
    """Twelve starts: E a share of the lowest loss, both exponents low or high, and no gains."""
    lowest, mean, gains = ladder.losses.min(), ladder.losses.mean(), np.zeros(ladder.number - SHAPE)
    found = []
    for share, alpha, beta in itertools.product((0.4, 0.7, 0.9), (0.2, 0.5), (0.2, 0.5)):
        term = math.log(max(mean - share * lowest, 1e-3) / 2)
        shape = [math.log(share * lowest), term, term, math.log(alpha), math.log(beta)]
        found.append(np.concatenate([shape, gains]))
    return found


# --- noise ------------------------------------------------------------------------------------------------------------


def whitening(rungs: Sequence[Rung], residuals: Array) -> Array:
    """The matrix that makes residuals uncorrelated: the inverse of the Cholesky factor of their correlations.

    Two correlations are estimated by moments: between the arms of a (size, duration, seed), and between the durations
    of a (size, seed, arm).

    Args:
        rungs: in the order of the residuals
        residuals: in nats
    """
    variance = (residuals**2).mean()
    products = np.outer(residuals, residuals) / (variance or 1.0)
    of_arms, of_durations = _shared(rungs)
    found = [float(np.clip(products[pair].mean(), 0, 0.9)) if pair.any() else 0.0 for pair in (of_arms, of_durations)]
    shrink = min(1.0, MOST_CORRELATED / sum(found)) if any(found) else 1.0
    return _uncorrelating(len(rungs), shrink * (found[0] * of_arms + found[1] * of_durations))


def _uncorrelating(number: int, correlations: Array) -> Array:
    return np.linalg.inv(np.linalg.cholesky(np.eye(number) + correlations))


def _shared(rungs: Sequence[Rung]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pairs of rungs are arms of one (size, duration, seed), and which are durations of one trunk."""
    of_arms = _pairs(rungs, lambda rung: (rung.size, rung.duration, rung.seed))
    return of_arms, _pairs(rungs, lambda rung: (rung.size, rung.seed, rung.arm))


def _pairs(rungs: Sequence[Rung], key: Callable[[Rung], object]) -> NDArray[np.bool_]:
    """Which pairs of different rungs have the same key."""
    keys = [key(rung) for rung in rungs]
    return np.array([[i != j and a == b for j, b in enumerate(keys)] for i, a in enumerate(keys)])


@dataclass(frozen=True)
class Usual:
    """A law and its noise as small models of text have them, to plan with.

    Args:
        floor: E, in nats
        of_size, of_data: the terms at 1e6 parameters and at 4e6 tokens, in nats
        exponent: α and β
        noise: standard deviation of a training, in nats
        pairing, trunk: shares of its variance that the arms of a seed, and the durations of a trunk, have in common
    """

    floor: float = 1.1
    of_size: float = 0.2
    of_data: float = 0.4
    exponent: float = 0.35
    noise: float = 0.007
    pairing: float = 0.5
    trunk: float = 0.2


def expected(rungs: Sequence[Rung], baseline: str, form: Form, usual: Usual) -> float:
    """The standard error of log s that a planned ladder will have, by the delta method.

    Args:
        rungs: planned; their losses do not matter
        baseline, form: as of ``fit``
        usual: the law that is assumed, with arms that are equal
    """
    ladder = arranged(rungs, baseline, form)
    n, d = ladder.center[0] - math.log(1e6), ladder.center[1] - math.log(4e6)
    terms = [math.log(usual.of_size) - usual.exponent * n, math.log(usual.of_data) - usual.exponent * d]
    shape = [math.log(usual.floor), *terms, *[math.log(usual.exponent)] * 2]
    theta = np.concatenate([shape, np.zeros(ladder.number - SHAPE)])
    of_arms, of_durations = _shared(rungs)
    white = _uncorrelating(len(rungs), usual.pairing * of_arms + usual.trunk * of_durations)
    jacobian = white @ predict(theta, ladder.n, ladder.d, ladder.size_gain, ladder.data_gain)[1]
    return Fit(ladder, theta, jacobian, usual.noise**2, 0.0).speed_up(ladder.arms[1]).se


# --- speed-up ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """An estimate and its interval at ``LEVEL``; infinite where the baseline never reaches the arm's loss."""

    mean: float
    low: float
    high: float


LINES = {"data": (0.0, 1.0), "ratio": (0.5, 0.5), "size": (1.0, 0.0)}


def speed_up_along(
    fit: Fit, arm: str, parameters: float, tokens: float, line: Literal["data", "ratio", "size"]
) -> Range:
    """How many times the compute the baseline needs for the loss of an arm, if it is spent along a line.

    Solves L_baseline(c^x N, c^y D) = L_arm(N, D) for c, for each draw of the law's parameters.

    Args:
        fit: of both
        arm: that is at (N, D)
        parameters, tokens: N and D
        line: ``data``: the same size, more tokens; ``ratio``: the same tokens per parameter; ``size``: the same tokens
    """
    draws = np.vstack([fit.theta, _draws(fit)])
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
    low_end, high_end = np.quantile(found[1:], ends, method="nearest") if fit.dof >= 1 else (0.0, math.inf)
    return Range(float(found[0]), float(low_end), float(high_end))


def _draws(fit: Fit) -> Array:
    """Parameters from a multivariate t distribution about the fitted ones, with a fixed seed."""
    chance = np.random.default_rng(SEED)
    normal = chance.multivariate_normal(np.zeros(len(fit.theta)), fit.covariance(), DRAWS, method="svd")
    dof = max(fit.dof, 1)
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
