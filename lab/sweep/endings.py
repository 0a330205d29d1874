"""What follows when a sweep has ended: its report, and what it leaves to later sweeps.

The kind of a plan names a module of the entry-point group ``blockwright.endings``, which has the two functions of
``Ending``. The command that starts a sweep and the one that resumes it both end there.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from blockwright.training.result import Result

ENTRY_POINTS = "blockwright.endings"


class Ending(Protocol):
    """What a package offers."""

    def need_packages(self) -> None:
        """Refuse a sweep that could not be concluded, before its jobs run.

        Raises:
            ConfigError: a package is missing
        """

    def conclude(self, directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> None:
        """Report a sweep. It may be called again.

        Args:
            directory: of the sweep
            plan: contents of its plan.json
            results: number → result of each of its jobs

        Raises:
            ConfigError: there is nothing to report, or it cannot be written
        """


def of(plan: Mapping[str, Any]) -> list[Ending]:
    """Those of a plan's kind; a grid has none."""
    return [point.load() for point in entry_points(group=ENTRY_POINTS) if point.name == plan["kind"]]


def conclude(directory: Path, plan: Mapping[str, Any]) -> None:
    """Conclude a sweep, if all of its jobs have ended."""
    results = {job["job"]: Result.read(directory / str(job["job"])) for job in plan["jobs"]}
    if all(result.ended for result in results.values()):
        for ending in of(plan):
            ending.conclude(directory, plan, results)
