"""The noise of a ladder's rungs: variances of what they share, and the degrees of freedom that these leave an estimate.

    V = v₁ I + v₂ G_pair + v₃ G_trunk + T

G is 1 where two rungs share a draw: of the arms of a (size, duration, seed), which see the same data, or of the
durations of a (size, seed, arm), which are decays of one trunk. T is what tuning leaves, which is known from the tries
(``Common``): without it, of ladders under a true law in which it had a standard deviation of 0.003 and 0.006 nats, 12
and 32 % did not fit at a nominal 1 % (5 % where it is known), and intervals of s covered .90 and .87.
The variances v are by restricted maximum likelihood (Patterson and Thompson 1971, doi 10.1093/biomet/58.3.545): each
step solves

    Σ_l tr(P G_k P G_l) v_l = rᵀ P G_k P r − tr(P G_k P T),    P = V⁻¹ − V⁻¹ J (Jᵀ V⁻¹ J)⁻¹ Jᵀ V⁻¹

so that what the fit takes of the noise is counted, which the mere products of residuals leave out.

An estimate aᵀy has variance f = Σ v_k aᵀG_k a, of which T's share is added. Its degrees of freedom are Satterthwaite's,
ν = 2 f² / (qᵀ W q), with q_k = aᵀG_k a and W the covariance of v (Giesbrecht and Burns 1985, doi 10.2307/2530872).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from blockwright.lab.statistics.law import Array, Common, Rung
from blockwright.lab.statistics.variance import Left, satterthwaite

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
