"""The design of a ladder: tries until every arm is tuned, then the compared jobs at the values that they lead to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from blockwright.lab.ladder.outline import Job, Outline, compared, outline_of, tries
from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.law import Common
from blockwright.lab.statistics.tuning import Fit, Try
from blockwright.lab.statistics.variance import Left
from blockwright.lab.sweep.tuning import COMPARE, RATE, SD_OF_RUN, TUNE, loss_of, next_round
from blockwright.training.result import Result

ROUNDS = 4  # of further tries at a size, after which an arm counts as not tuned
STEEPEST = -0.5  # of log rate over log N, which grows with the square of the width: AdamW without rules of width
Place = tuple[str, str]  # size and arm


def more(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> list[Job]:
    """The jobs that follow, of ``blockwright.designs``.

    Args:
        directory: of the ladder
        plan: contents of its plan.json
        results: number → result of each of its jobs
    """
    outline = outline_of(plan)
    first = 1 + max(job["job"] for job in plan["jobs"])
    if any(job.get("stage") == COMPARE for job in plan["jobs"]):
        return []
    tried = tried_of(plan, results)
    jobs: list[Job] = []
    for size in outline.tuned_sizes:
        jobs += _further(outline, size, {arm: tried[size, arm] for arm in outline.sizes[size].arms}, first + len(jobs))
    return jobs or compared(outline, values(outline, tuned_of(outline, tried)), first)


def _further(outline: Outline, size: str, of: Mapping[str, list[Try]], first: int) -> list[Job]:
    """The next round of a size."""
    jobs: list[Job] = []
    for arm, further in next_round(of, outline.tries, ROUNDS, SD_OF_RUN).items():
        jobs += tries(outline, size, arm, further, first + len(jobs))
    return jobs


def tried_of(plan: Mapping[str, Any], results: Mapping[int, Result]) -> dict[Place, list[Try]]:
    """Size and arm → what was tried, with the mean loss of its durations; a lost job has an infinite loss."""
    losses: dict[Place, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for job in plan["jobs"]:
        if job.get("stage") == TUNE:
            (value,) = job["tries"].values()
            loss = loss_of(results[job["job"]].value(plan["metric"]))
            losses[job["size"], job["arm"]][float(value)].append(loss)
    return {place: [Try(value, fmean(of)) for value, of in each.items()] for place, each in losses.items()}


@dataclass(frozen=True)
class Tuned:
    """An arm that was tuned at a size.

    Args:
        tries: all of them
        fit: of them
    """

    tries: tuple[Try, ...]
    fit: Fit


def tuned_of(outline: Outline, tried: Mapping[Place, list[Try]]) -> dict[Place, Tuned]:
    """Size and arm → its tuning."""
    return {
        place: Tuned(tuple(each), tuning.fit(each)) for place, each in tried.items() if place[0] in outline.tuned_sizes
    }


def common_of(outline: Outline, tuned: Mapping[Place, Tuned], sd_of_run: float) -> tuple[Common, ...]:
    """What tuning leaves: at each tuned size of an arm; beyond, where values follow from those, the mean of these.

    Args:
        outline: of the ladder
        tuned: size and arm → its tuning
        sd_of_run: of a training, without what all arms of its seed have in common
    """
    return spread(outline, {place: of.fit.left(sd_of_run) for place, of in tuned.items()})


def spread(outline: Outline, left: Mapping[Place, Left]) -> tuple[Common, ...]:
    """What tuning leaves at each size, given what it leaves where arms are tuned: ``common_of``."""
    of_arms: dict[str, dict[str, Left]] = defaultdict(dict)
    for (size, arm), of in left.items():
        of_arms[arm][size] = of
    found = []
    for arm, own in of_arms.items():
        every = sum(own.values(), Left())
        beyond = Left(every.variance / len(own), every.dof)
        found += [Common(arm, frozenset({size}), left) for size, left in own.items()]
        found.append(Common(arm, frozenset(outline.sizes.keys() - own.keys()), beyond))
    return tuple(found)


def values(outline: Outline, tuned: Mapping[Place, Tuned]) -> dict[Place, float]:
    """Size and arm → value: the vertex where an arm was tuned; beyond, from an arm's mean along a common slope.

    The slope, of log value over log N, is one for all arms: with an arm's own, the noise of two vertices at sizes near
    each other came to two octaves at the largest. A rate falls with N, by an octave a doubling of the width at most.
    """
    known: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for size in outline.tuned_sizes:
        for arm, cell in outline.sizes[size].arms.items():
            known[arm].append((math.log(cell.parameters), math.log(tuned[size, arm].fit.vertex)))
    slope = common_slope(list(known.values()))
    slope = min(0.0, max(STEEPEST, slope)) if outline.tune == RATE else slope
    found = {}
    for size, of in outline.sizes.items():
        for arm, cell in of.arms.items():
            x, y = _mean(known[arm])
            beyond = math.exp(y + slope * (math.log(cell.parameters) - x))
            found[size, arm] = tuned[size, arm].fit.vertex if size in outline.tuned_sizes else beyond
    return found


def common_slope(lines: Sequence[Sequence[tuple[float, float]]]) -> float:
    """The least-squares slope of parallel lines, each through points of its own; 0 of one point each."""
    centred = [(x - x0, y - y0) for points in lines for x0, y0 in [_mean(points)] for x, y in points]
    spread = math.fsum(x * x for x, _ in centred)
    return math.fsum(x * y for x, y in centred) / spread if spread else 0.0


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return math.fsum(x for x, _ in points) / len(points), math.fsum(y for _, y in points) / len(points)
