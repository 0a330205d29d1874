"""What a ladder has found: its rungs, its law, how its arms were tuned, and their differences at the rungs.

A difference at a rung holds whether or not a law fits. Two seeds of a rung have one degree of freedom for their noise,
and Student's t then asks for 12.7 standard errors. So the noise here is that of all trainings about the means of their
cells, with what tuning leaves in both arms (statistics/law.py): its parts are the same at every rung.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from blockwright.lab.ladder.design import Cell, Job, Outline, Place, Tuned, common_of, outline_of, tried_of, tuned_of
from blockwright.lab.statistics.intervals import LEVEL, Interval
from blockwright.lab.statistics.law import Common, Rung, largest, on_one_thread
from blockwright.lab.statistics.law_check import Cells, Conclusion, cells, conclude
from blockwright.lab.statistics.tuning import COMPARE
from blockwright.lab.statistics.variance import Noise
from blockwright.lab.sweep import plan as plans
from blockwright.registry import ConfigError
from blockwright.training.result import UNFINISHED, Result

SPEED = "speed/tokens_per_second"


@dataclass(frozen=True)
class Lost:
    """A compared job without a figure."""

    job: int
    arm: str
    name: str
    reason: str
    is_unfinished: bool


@dataclass(frozen=True)
class Findings:
    """The findings of a ladder.

    Args:
        directory: of the ladder
        plan: contents of its plan.json
        outline: of its jobs
        rungs: the ends of its trainings
        law: that they follow, and what may be said by it; None if they are too few to fit one
        tuned: size and arm → its tuning
        speeds: arm → tokens per second of its trunks at the largest size, mean over seeds
        lost: compared jobs without a figure
        common: what tuning leaves
    """

    directory: Path
    plan: Mapping[str, Any]
    outline: Outline
    rungs: tuple[Rung, ...]
    law: Conclusion | None
    tuned: Mapping[Place, Tuned]
    speeds: Mapping[str, float]
    lost: tuple[Lost, ...]
    common: tuple[Common, ...] = ()

    @property
    def baseline(self) -> str:
        return self.outline.baseline

    @property
    def arms(self) -> list[str]:
        """The baseline first."""
        every = next(iter(self.outline.sizes.values())).arms
        return [self.baseline, *(arm for arm in every if arm != self.baseline)]

    @property
    def largest_rung(self) -> Rung:
        """One of the largest size, of its longest duration that has a figure."""
        return largest(self.rungs)

    @property
    def largest(self) -> str:
        return list(self.outline.sizes)[-1]

    def flops(self, arm: str) -> float:
        """Training FLOPs per token and parameter of the baseline over those of an arm, at the largest size.

        Per parameter too, since s is of parameters × tokens: an arm of half the size that costs half as much a token
        has its saving in s already.
        """
        ours, theirs = self._largest(arm), self._largest(self.baseline)
        return theirs.flops / ours.flops * ours.parameters / theirs.parameters

    def throughput(self, arm: str) -> float | None:
        """Measured tokens × parameters per second of an arm over those of the baseline, at the largest size."""
        ours, theirs = self.speeds.get(arm), self.speeds.get(self.baseline)
        sizes = self._largest(arm).parameters / self._largest(self.baseline).parameters
        return ours / theirs * sizes if ours and theirs else None

    def _largest(self, arm: str) -> Cell:
        return self.outline.sizes[self.largest].arms[arm]

    @cached_property
    def seeds(self) -> Cells | None:
        """The noise of the rungs, by their seeds and with what tuning leaves; None if no cell has two seeds."""
        return on_one_thread(cells)(self.rungs, self.common)


def find(directory: Path) -> Findings:
    """Evaluate a ladder.

    Raises:
        ConfigError: not a ladder's folder, or no compared job has a figure
    """
    directory = directory.resolve()
    plan = plans.read(directory)
    if plan["kind"] != "ladder":
        remedy = f"Write blockwright report {directory}"
        raise ConfigError("DIR", str(directory), f"is of kind {plan['kind']}, not a ladder", remedy)
    outline = outline_of(plan)
    results = {job["job"]: Result.read(directory / str(job["job"])) for job in plan["jobs"]}
    jobs = [job for job in plan["jobs"] if job.get("stage") == COMPARE]
    losses = {job["job"]: results[job["job"]].value(plan["metric"]) for job in jobs}
    rungs = tuple(_rung(job, loss) for job in jobs if (loss := losses[job["job"]]) is not None)
    if not rungs:
        plans.refuse_record(directory)
    if outline.baseline not in {rung.arm for rung in rungs}:
        rule = f"has no figure of the baseline {outline.baseline} yet"
        raise ConfigError("DIR", str(directory), rule, f"Resume it: blockwright sweep resume {directory}")
    lost = tuple(_lost(job, results[job["job"]]) for job in jobs if losses[job["job"]] is None)
    tuned = tuned_of(outline, tried_of(plan, results)) if outline.tune else {}
    speeds = _speeds(outline, [job for job in jobs if "after" not in job], results)
    seeds = on_one_thread(cells)(rungs)
    common = () if seeds is None else common_of(outline, tuned, seeds.noise.sd_of_run)
    # None without seeds, sizes and durations enough for an interval
    trunks = {(rung.size, rung.seed) for rung in rungs}
    arms = {rung.arm for rung in rungs}
    few = len(trunks) < 4 or len(rungs) <= 5 + 2 * (len(arms) - 1) or len(arms) < 2
    law = None if few else conclude(rungs, outline.baseline, common)
    return Findings(directory, plan, outline, rungs, law, tuned, speeds, lost, common)


def _rung(job: Job, loss: float) -> Rung:
    return Rung(job["arm"], job["size"], job["duration"], job["seed"], job["parameters"], job["tokens"], loss)


def _lost(job: Job, result: Result) -> Lost:
    reason = result.reason or result.status
    return Lost(job["job"], job["arm"], plans.name_of(job), reason, result.status == UNFINISHED)


def _speeds(outline: Outline, trunks: Sequence[Job], results: Mapping[int, Result]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for job in trunks:
        speed = results[job["job"]].metrics.get(SPEED)
        if job["size"] == list(outline.sizes)[-1] and speed is not None and math.isfinite(speed):
            found[job["arm"]].append(speed)
    return {arm: math.fsum(each) / len(each) for arm, each in found.items()}


At = tuple[str, str]  # size and duration


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline, in nats.

    Args:
        interval: its mean and 95 % interval, without ends if no cell has two seeds; ``n`` seeds, the fewest of a rung
        p: of the t-test that it is 0; None without an interval
    """

    interval: Interval
    p: float | None


def of_rungs(findings: Findings, arm: str) -> dict[At, Difference]:
    """Size and duration → the difference there; rungs without a common seed are left out."""
    pairs = _pairs(findings, arm)
    return {place: _difference(findings, {place: of}) for place, of in pairs.items()}


def over_all(findings: Findings, arm: str) -> Difference | None:
    """The mean of those at all rungs, each with the same weight; None if there is no common seed."""
    pairs = _pairs(findings, arm)
    return _difference(findings, pairs) if pairs else None


def _pairs(findings: Findings, arm: str) -> dict[At, list[tuple[int, int]]]:
    """Size and duration → the numbers of the rungs of arm and baseline, a pair for each seed that both have."""
    at = {(r.arm, r.size, r.duration, r.seed): i for i, r in enumerate(findings.rungs)}
    found: dict[At, list[tuple[int, int]]] = {}
    for size, of in findings.outline.sizes.items():
        for duration in of.steps:
            keys = [((arm, size, duration, s), (findings.baseline, size, duration, s)) for s in findings.outline.seeds]
            pairs = [(at[ours], at[theirs]) for ours, theirs in keys if ours in at and theirs in at]
            if pairs:
                found[size, duration] = pairs
    return found


def _difference(findings: Findings, pairs: Mapping[At, Sequence[tuple[int, int]]]) -> Difference:
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
