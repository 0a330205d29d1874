"""Designs of sweeps that grow: which jobs follow, by the results of those before.

The kind of a plan names its design, a function of the entry-point group ``blockwright.designs``:
``(directory, plan, results) -> further jobs``. The sweep ends when it returns none. It reads nothing that changes by
itself, such as a clock: a sweep that was killed continues to the same jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from blockwright.training.result import Result

ENTRY_POINTS = "blockwright.designs"


class Design(Protocol):
    """What a package offers."""

    def __call__(self, directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> list[dict[str, Any]]:
        """The jobs that follow when all jobs of a plan have ended.

        Args:
            directory: of the sweep
            plan: contents of its plan.json
            results: number → result of each of its jobs

        Returns:
            jobs as in plan.json, whose numbers continue the plan's; none: the sweep has ended
        """


def kinds() -> list[str]:
    """The kinds of plans that have a design, which is not imported."""
    return sorted(point.name for point in entry_points(group=ENTRY_POINTS))


def following(directory: Path, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The jobs that follow those of a plan; none before all of them have ended, or for a plan without a design."""
    results = {job["job"]: Result.read(directory / str(job["job"])) for job in plan["jobs"]}
    if not all(result.ended for result in results.values()):
        return []
    designs = [point for point in entry_points(group=ENTRY_POINTS) if point.name == plan["kind"]]
    return [job for point in designs for job in point.load()(directory, plan, results)]
