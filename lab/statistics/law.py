"""One scaling law for all arms of a ladder: a shared shape, and how much further each arm gets with its size and data.

    L_k(N, D) = E + A (ρ_N,k N)^−α + B (ρ_D,k D)^−β        ρ of the baseline is 1

L is the loss in nats of a training whose rate has decayed, N the parameters without embedding and head, D the tokens of
training. The form is that of Hoffmann et al. (2022, arXiv:2203.15556). Shared exponents with factors of each arm are
those of Volkova et al. (2026, arXiv:2602.07712) for optimizers, because a law for each arm alone is ill-conditioned.

An arm has the loss at (N, D) that the baseline has at (ρ_N N, ρ_D D). So at the best split of the compute 6ND into size
and data the arm is faster by s = ρ_N ρ_D, whatever the budget. Lines other than the best split: law_fit.py.

The fit (law_fit.py) is by least squares from 12 starts, then again with what the residuals share: the
arms of a seed, which see the same data, and the durations of a training, which are decays of one trunk. A robust loss
is not needed, since a diverged training is a lost one. Intervals are Student's, with the degrees of freedom that each
estimate has; in simulations they cover .93 to .97 at 95 % (tests/lab/statistics/test_law.py). As many degrees as there
are pairs of size and seed, which is a third of what s has, made them cover .98.

Left out, since they cover less: a bootstrap over three seeds (.84), and one over the points of a curve, which are not
independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Literal, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from blockwright.lab.statistics.variance import Left, satterthwaite

# --- linear algebra of small matrices on one thread -------------------------------------------------------------------


P = ParamSpec("P")
R = TypeVar("R")


def on_one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """The function with one thread for NumPy's and SciPy's products, and as many as before after it."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import scipy.linalg  # noqa: F401  (its own library, which is limited only once it is loaded)
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            return function(*args, **kwargs)

    return run


Array = NDArray[np.float64]
Form = Literal["apart", "alike"]
SHAPE = 5  # parameters of the law's shape: log E, log of the two terms at the mean rung, log α, log β


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


def largest(rungs: Sequence[Rung]) -> Rung:
    """One of the largest size, and of the longest duration there."""
    return max(rungs, key=lambda rung: (rung.parameters, rung.tokens))


@dataclass(frozen=True)
class Common:
    """What tuning leaves in an arm at some sizes, whose trainings have one value, or values that follow from others.

    Args:
        arm: its name
        sizes: names
        left: its variance in nats², with degrees of freedom
    """

    arm: str
    sizes: frozenset[str]
    left: Left

    def has(self, rung: Rung) -> bool:
        return rung.arm == self.arm and rung.size in self.sizes


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
        common: what tuning leaves
    """

    rungs: tuple[Rung, ...]
    arms: tuple[str, ...]
    form: Form
    n: Array
    d: Array
    center: tuple[float, float]
    size_gain: Array
    data_gain: Array
    common: tuple[Common, ...] = ()

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


def arranged(rungs: Sequence[Rung], baseline: str, form: Form, common: Sequence[Common] = ()) -> Ladder:
    """Rungs as arrays.

    Args:
        rungs: of all arms
        baseline: the arm whose ρ are 1
        form, common: see ``Ladder``
    """
    arms = (baseline, *dict.fromkeys(rung.arm for rung in rungs if rung.arm != baseline))
    n, d = (np.log([getattr(rung, name) for rung in rungs]) for name in ("parameters", "tokens"))
    size_gain, data_gain = gains_of(arms, [rung.arm for rung in rungs], form)
    center = float(n.mean()), float(d.mean())
    return Ladder(tuple(rungs), arms, form, n - center[0], d - center[1], center, size_gain, data_gain, tuple(common))


def gains_of(arms: Sequence[str], of: Sequence[str], form: Form) -> tuple[Array, Array]:
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


# --- the noise of a ladder's rungs ------------------------------------------------------------------------------------


STEPS, TOLERANCE = 50, 1e-6  # of the variances
LEAST_OWN = 1e-3  # share of a rung's variance that it has in common with no other; with none V would be singular
LEAST = 1e-30  # nats², of rungs without noise


@dataclass(frozen=True)
class RungNoise:
    """The noise of some rungs.

    Args:
        parts: [K, rungs, rungs], G of a rung, and of a pair and a trunk as far as rungs share them
        variances: [K], of these, in nats²
        uncertainty: [K, K], covariance of the variances; 0 of one that is not above 0
        known: T, as its parts: [M, rungs], 1 where a rung has it, with what it is
    """

    parts: Array
    variances: Array
    uncertainty: Array
    known: tuple[tuple[Array, Left], ...] = ()

    @property
    def sd_of_run(self) -> float:
        """Standard deviation of a training, in nats, without what all arms of its seed have in common.

        The second part is of pairs, also where each training has one duration, and none is of trunks.
        """
        return math.sqrt(float(self.variances[0] + self.variances[2:].sum()))

    @property
    def covariance(self) -> Array:
        """V: [rungs, rungs], in nats²."""
        return np.tensordot(self.variances, self.parts, 1) + _matrix(self.known, self.parts.shape[1])

    @cached_property
    def whitening(self) -> Array:
        """The matrix that makes the noise uncorrelated, of variance 1: the inverse of the Cholesky factor of V."""
        return np.linalg.inv(np.linalg.cholesky(self.covariance))

    def among(self, chosen: NDArray[np.intp]) -> RungNoise:
        """Of some of the rungs."""
        known = tuple((has[chosen], left) for has, left in self.known)
        return RungNoise(self.parts[:, chosen[:, None], chosen], self.variances, self.uncertainty, known)

    def of(self, weights: Array) -> tuple[float, float]:
        """Variance of a weighted sum of the rungs' losses, and the degrees of freedom of this variance.

        They are at most those of the seeds' share, so that what tuning leaves lessens no p.
        """
        each = np.einsum("i,kij,j->k", weights, self.parts, weights)
        with np.errstate(over="ignore", invalid="ignore"):
            variance, spread = float(self.variances @ each), float(each @ self.uncertainty @ each)
        seeds = Left(variance, 2 * variance**2 / spread if spread > 0 else 0.0)
        left = sum((Left(float(weights @ has) ** 2 * one.variance, one.dof) for has, one in self.known), Left())
        if not left.variance or not math.isfinite(variance):
            return seeds.variance, seeds.dof
        return variance + left.variance, min(seeds.dof, satterthwaite(seeds, left))


def shares(rungs: Sequence[Rung]) -> Array:
    """[3, rungs, rungs]: 1 where two rungs are the same, arms of a (size, duration, seed), or durations of a trunk."""
    of_arms = _alike(rungs, lambda rung: (rung.size, rung.duration, rung.seed))
    return np.stack([np.eye(len(rungs)), of_arms, _alike(rungs, lambda rung: (rung.size, rung.seed, rung.arm))])


def _alike(rungs: Sequence[Rung], key: Callable[[Rung], object]) -> Array:
    keys = [key(rung) for rung in rungs]
    return np.array([[float(a == b) for b in keys] for a in keys])


def independent(number: int) -> RungNoise:
    """The noise of rungs that share nothing, of variance 1, for a fit that comes before its noise is known."""
    return RungNoise(np.eye(number)[None], np.ones(1), np.zeros((1, 1)))


def estimated(parts: Array, variances: Array, jacobian: Array, known: tuple[tuple[Array, Left], ...] = ()) -> RungNoise:
    """Variances with the uncertainty that an estimate of them has, after a model is fitted.

    Args:
        parts: of ``shares``
        variances: in nats²
        jacobian: [rungs, parameters], of the model's losses
        known: of ``RungNoise``
    """
    free = np.ix_(variances > 0, variances > 0)
    matrix = _matrix(known, len(jacobian))
    products, _ = _equations(parts, variances, matrix, jacobian, np.zeros(len(jacobian)))
    uncertainty = np.zeros_like(products)
    uncertainty[free] = 2 * np.linalg.pinv(products[free])
    return RungNoise(parts, variances, uncertainty, known)


def noise_of(rungs: Sequence[Rung], jacobian: Array, residuals: Array, common: Sequence[Common] = ()) -> RungNoise:
    """The noise about a fitted model.

    Args:
        rungs: in the order of the residuals
        jacobian: [rungs, parameters], of the model's losses
        residuals: in nats
        common: what tuning leaves
    """
    from scipy.optimize import nnls

    known = known_of(rungs, common)
    matrix = _matrix(known, len(rungs))
    own, *shared = shares(rungs)
    parts = np.stack([own, *(part for part in shared if part.sum() > len(rungs))])  # of one duration no trunk is seen
    total = float(residuals @ residuals) / max(len(rungs) - jacobian.shape[1], 1) or LEAST
    variances = np.full(len(parts), total / len(parts))
    for _ in range(STEPS):
        before = variances
        variances, _ = nnls(*_equations(parts, before, matrix, jacobian, residuals))
        variances[0] = max(variances[0], LEAST_OWN * max(variances.sum(), LEAST_OWN * total))
        if np.abs(variances - before).max() < TOLERANCE * total:
            break
    return estimated(parts, variances, jacobian, known)


def known_of(rungs: Sequence[Rung], common: Sequence[Common]) -> tuple[tuple[Array, Left], ...]:
    """What tuning leaves as parts of T: 1 where a rung has it, with what it is."""
    return tuple((np.array([float(each.has(rung)) for rung in rungs]), each.left) for each in common)


def _matrix(known: Sequence[tuple[Array, Left]], number: int) -> Array:
    """T: [rungs, rungs], in nats²."""
    return sum((left.variance * np.outer(has, has) for has, left in known), np.zeros((number, number)))


def _equations(parts: Array, variances: Array, known: Array, jacobian: Array, residuals: Array) -> tuple[Array, Array]:
    """tr(P G_k P G_l), and rᵀ P G_k P r − tr(P G_k P T)."""
    inverse = np.linalg.inv(np.tensordot(variances, parts, 1) + known)
    slope = inverse @ jacobian
    projected = inverse - slope @ np.linalg.pinv(jacobian.T @ slope) @ slope.T
    each, white = projected @ parts, projected @ residuals
    found = np.einsum("i,kij,j->k", white, parts, white) - np.einsum("kij,ji->k", each, projected @ known)
    return np.einsum("kij,lji->kl", each, each), found
