"""Differences of an arm to the baseline at the rungs of a ladder, which hold whether or not a law fits.

Two seeds of a rung have one degree of freedom for their noise, and Student's t then asks for 12.7 standard errors. So
the noise here is that of all trainings about the means of their cells (statistics/law_noise.py): its parts are the same
at every rung. What tuning leaves in both arms is added, as in an ablation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockwright.lab.ladder.findings import Findings
from blockwright.lab.statistics.intervals import LEVEL, Interval
from blockwright.lab.statistics.law import Array
from blockwright.lab.statistics.law_check import Cells
from blockwright.lab.statistics.variance import Left, Noise

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
    return {place: _difference(findings, arm, {place: of}) for place, of in pairs.items()}


def over_all(findings: Findings, arm: str) -> Difference | None:
    """The mean of those at all rungs, each with the same weight; None if there is no common seed."""
    pairs = _pairs(findings, arm)
    return _difference(findings, arm, pairs) if pairs else None


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


def _difference(findings: Findings, arm: str, pairs: Mapping[Place, Sequence[tuple[int, int]]]) -> Difference:
    weights = np.zeros(len(findings.rungs))
    shares = defaultdict[str, float](float)
    for (size, _), of in pairs.items():
        shares[size] += 1 / len(pairs)
        for ours, theirs in of:
            weights[[ours, theirs]] += np.array([1, -1]) / (len(of) * len(pairs))
    mean, n = float(weights @ [rung.loss for rung in findings.rungs]), min(map(len, pairs.values()))
    noise = None if findings.seeds is None else _noise(findings, findings.seeds, arm, weights, shares)
    if noise is None:
        return Difference(Interval(mean, None, None, n), None)
    half = noise.half(1, LEVEL)
    return Difference(Interval(mean, mean - half, mean + half, n), noise.p(mean, 1))


def _noise(findings: Findings, seeds: Cells, arm: str, weights: Array, shares: Mapping[str, float]) -> Noise | None:
    """Of a weighted sum of the rungs' losses, as of one difference; None if the seeds do not tell it."""
    variance, dof = seeds.noise.of(weights)
    if dof < 1 or not math.isfinite(variance):
        return None
    left = [_left(findings, each, shares, seeds.noise.sd_of_run) for each in (arm, findings.baseline)]
    return Noise(math.sqrt(variance), dof, "pooled", sum(left, Left()))


def _left(findings: Findings, arm: str, shares: Mapping[str, float], sd_of_run: float) -> Left:
    """What tuning leaves in the mean of an arm.

    A value serves all durations of a size, so what it costs is common to them. Beyond the tuned sizes values follow
    from those there, so that it is common to them too, and taken for as much as the mean of the tuned ones.

    Args:
        shares: size → its share of the mean
    """
    own = {size: of.fit.left(sd_of_run) for (size, name), of in findings.tuned.items() if name == arm}
    if not own:
        return Left()
    everywhere, beyond = sum(own.values(), Left()), sum(share for size, share in shares.items() if size not in own)
    parts = [Left(shares.get(size, 0.0) ** 2 * each.variance, each.dof) for size, each in own.items()]
    return sum(parts, Left(beyond**2 * everywhere.variance / len(own), everywhere.dof))
