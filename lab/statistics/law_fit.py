"""The fit of a ladder's law, by generalised least squares, and what it estimates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from blockwright.lab.statistics.intervals import LEVEL
from blockwright.lab.statistics.law import SHAPE, Array, Common, Form, Ladder, Rung, arranged, gains_of, predict
from blockwright.lab.statistics.law_noise import RungNoise, independent, noise_of
from blockwright.lab.statistics.one_thread import on_one_thread

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
