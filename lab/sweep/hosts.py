"""Hosts of jobs: what runs the jobs of some sweeps, if not this machine.

A launcher that hands its jobs over names their host in its class attribute ``host``. The host is a module, the entry
point of that name in the group ``blockwright.hosts``; under the same name the plan of a sweep keeps what the host needs
to find its jobs again.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

ENTRY_POINTS = "blockwright.hosts"


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
def installed() -> dict[str, EntryPoint]:
    """Name → entry point of each host."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def is_hosted(plan: Mapping[str, Any]) -> bool:
    """Whether the jobs of a sweep run on a host."""
    return not installed().keys().isdisjoint(plan)


def begin(name: str, launcher: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan keeps of a host, by its name."""
    return {name: installed()[name].load().begin(launcher)}


def jobs_of(sweep: Path, plan: Mapping[str, Any]) -> Jobs | None:
    """The jobs of a sweep on its host; None if they run on this machine."""
    name = next((name for name in installed() if name in plan), None)
    return None if name is None else installed()[name].load().jobs_of(sweep, plan)
