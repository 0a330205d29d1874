"""Differences of an arm to the baseline at the rungs of a ladder, which hold whether or not a law fits.

Two seeds of a rung have one degree of freedom for their noise, and Student's t then asks for 12.7 standard errors. So
the noise here is that of all trainings about the means of their cells, with what tuning leaves in both arms
(statistics/law.py): its parts are the same at every rung.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockwright.lab.ladder.findings import Findings
from blockwright.lab.statistics.intervals import LEVEL, Interval
from blockwright.lab.statistics.variance import Noise

Place = tuple[str, str]  # size and duration


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline, in nats.

    Args:
        interval: its mean and 95 % interval, without ends if no cell has two seeds; ``n`` seeds, the fewest of a rung
        p: of the t-test that it is 0; None without an interval
    """

    interval: Interval
    p: float | None


def of_rungs(findings: Findings, arm: str) -> dict[Place, Difference]:
    """Size and duration → the difference there; rungs without a common seed are left out."""
    pairs = _pairs(findings, arm)
    return {place: _difference(findings, {place: of}) for place, of in pairs.items()}


def over_all(findings: Findings, arm: str) -> Difference | None:
    """The mean of those at all rungs, each with the same weight; None if there is no common seed."""
    pairs = _pairs(findings, arm)
    return _difference(findings, pairs) if pairs else None


def _pairs(findings: Findings, arm: str) -> dict[Place, list[tuple[int, int]]]:
    """Size and duration → the numbers of the rungs of arm and baseline, a pair for each seed that both have."""
    at = {(r.arm, r.size, r.duration, r.seed): i for i, r in enumerate(findings.rungs)}
    found: dict[Place, list[tuple[int, int]]] = {}
    for size, of in findings.outline.sizes.items():
        for duration in of.steps:
            keys = [((arm, size, duration, s), (findings.baseline, size, duration, s)) for s in findings.outline.seeds]
            pairs = [(at[ours], at[theirs]) for ours, theirs in keys if ours in at and theirs in at]
            if pairs:
                found[size, duration] = pairs
    return found


def _difference(findings: Findings, pairs: Mapping[Place, Sequence[tuple[int, int]]]) -> Difference:
    weights = np.zeros(len(findings.rungs))
    for of in pairs.values():
        for ours, theirs in of:
            weights[[ours, theirs]] += np.array([1, -1]) / (len(of) * len(pairs))
    mean, n = float(weights @ [rung.loss for rung in findings.rungs]), min(map(len, pairs.values()))
    variance, dof = (math.inf, 0.0) if findings.seeds is None else findings.seeds.noise.of(weights)
    if dof < 1 or not math.isfinite(variance):
        return Difference(Interval(mean, None, None, n), None)
    noise = Noise(math.sqrt(variance), dof, "pooled")
    half = noise.half(1, LEVEL)
    return Difference(Interval(mean, mean - half, mean + half, n), noise.p(mean, 1))
