"""Speed-ups and splits of the compute by a fitted law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from blockwright.lab.statistics.intervals import LEVEL
from blockwright.lab.statistics.law import SHAPE, Array, largest
from blockwright.lab.statistics.law_fit import Estimate, Fit

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
