"""The design of a ladder: tries until every arm is tuned, then the compared jobs at the values that they lead to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.lab.ladder.outline import Job, Outline, compared, outline_of, tries
from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.tuning import Fit, Try
from blockwright.lab.sweep.tuning import COMPARE, SD_OF_RUN, TUNE, loss_of, next_round
from blockwright.training.result import Result

ROUNDS = 4  # of further tries at a size, after which an arm counts as not tuned
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
    """Size and arm → what was tried; a lost job has an infinite loss."""
    found: dict[Place, list[Try]] = defaultdict(list)
    for job in plan["jobs"]:
        if job.get("stage") == TUNE:
            (value,) = job["tries"].values()
            loss = loss_of(results[job["job"]].value(plan["metric"]))
            found[job["size"], job["arm"]].append(Try(float(value), loss))
    return dict(found)


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


def values(outline: Outline, tuned: Mapping[Place, Tuned]) -> dict[Place, float]:
    """Size and arm → value: the vertex where an arm was tuned; at larger sizes, the line through the tuned ones.

    The line is of log value over log N: the best rate falls with the width by half an octave to an octave a doubling
    under standard parametrisation, so the value of a smaller size would be too large.
    """
    found = {}
    for size, of in outline.sizes.items():
        for arm, cell in of.arms.items():
            at = {s: tuned[s, arm].fit.vertex for s in outline.tuned_sizes}
            known = [(math.log(outline.sizes[s].arms[arm].parameters), math.log(value)) for s, value in at.items()]
            found[size, arm] = at.get(size) or math.exp(_on_line(known, math.log(cell.parameters)))
    return found


def _on_line(points: list[tuple[float, float]], at: float) -> float:
    """The least-squares line through points; through one of them, a constant."""
    x0, y0 = (math.fsum(column) / len(points) for column in zip(*points, strict=True))
    spread = math.fsum((x - x0) ** 2 for x, _ in points)
    slope = math.fsum((x - x0) * (y - y0) for x, y in points) / spread if spread else 0.0
    return y0 + slope * (at - x0)
