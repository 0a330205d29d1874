"""What packages bring to sweeps: the jobs that follow from results, what follows the last one, and where jobs run.

The kind of a plan names its *design*, a function of the entry-point group ``blockwright.designs``:
``(directory, plan, results) -> further jobs``. The sweep ends when it returns none. It reads nothing that changes by
itself, such as a clock: a sweep that was killed continues to the same jobs.

The kind also names an *ending*, a module of the group ``blockwright.endings`` with the two functions of ``Ending``: the
report, and what is left to later sweeps. The command that starts a sweep and the one that resumes it both end there.

A launcher that hands its jobs over names their *host* in its class attribute ``host``: a module, the entry point of
that name in the group ``blockwright.hosts``. Under the same name the plan keeps what the host needs to find its jobs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from blockwright.training.result import Result

DESIGNS = "blockwright.designs"


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


def growing_kinds() -> list[str]:
    """The kinds of plans that have a design, which is not imported."""
    return sorted(point.name for point in entry_points(group=DESIGNS))


def following(directory: Path, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The jobs that follow those of a plan; none before all of them have ended, or for a plan without a design."""
    results = {job["job"]: Result.read(directory / str(job["job"])) for job in plan["jobs"]}
    if not all(result.ended for result in results.values()):
        return []
    designs = [point for point in entry_points(group=DESIGNS) if point.name == plan["kind"]]
    return [job for point in designs for job in point.load()(directory, plan, results)]


ENDINGS = "blockwright.endings"


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


def endings_of(plan: Mapping[str, Any]) -> list[Ending]:
    """Those of a plan's kind; a grid has none."""
    return [point.load() for point in entry_points(group=ENDINGS) if point.name == plan["kind"]]


def conclude(directory: Path, plan: Mapping[str, Any]) -> None:
    """Conclude a sweep, if all of its jobs have ended."""
    results = {job["job"]: Result.read(directory / str(job["job"])) for job in plan["jobs"]}
    if all(result.ended for result in results.values()):
        for ending in endings_of(plan):
            ending.conclude(directory, plan, results)


HOSTS = "blockwright.hosts"


class Jobs(Protocol):
    """The jobs of one sweep on a host."""

    def collect(self) -> dict[int, dict[str, str]]:
        """Write the results of jobs that have ended; returns number → ``status`` and ``reason`` of the others."""

    def stop(self, numbers: Collection[int] | None = None) -> tuple[list[int], list[int]]:
        """Stop jobs, all by default; returns the numbers of those that ran and of those that had not started."""


class Host(Protocol):
    """What the module of a host has."""

    def begin(self, launcher: Mapping[str, Any]) -> dict[str, Any]:
        """What the plan of a sweep keeps, by the options of its launcher."""

    def jobs_of(self, sweep: Path, plan: Mapping[str, Any]) -> Jobs:
        """The jobs of a sweep that was started on the host."""


@functools.cache
def hosts() -> dict[str, EntryPoint]:
    """Name → entry point of each host."""
    return {point.name: point for point in entry_points(group=HOSTS)}


def is_hosted(plan: Mapping[str, Any]) -> bool:
    """Whether the jobs of a sweep run on a host."""
    return not hosts().keys().isdisjoint(plan)


def begin_on(name: str, launcher: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan keeps of a host, by its name."""
    return {name: hosts()[name].load().begin(launcher)}


def jobs_of(sweep: Path, plan: Mapping[str, Any]) -> Jobs | None:
    """The jobs of a sweep on its host; None if they run on this machine."""
    name = next((name for name in hosts() if name in plan), None)
    return None if name is None else hosts()[name].load().jobs_of(sweep, plan)
