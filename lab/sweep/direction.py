"""Which way the figure of a sweep is better, by its plan and by what its runs say of their figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blockwright.registry import ConfigError
from blockwright.training.figure import Figure, better_of
from blockwright.training.result import Result


def maximizes(path: str, metric: str, described: Figure | None, *asked: tuple[str, Any]) -> bool:
    """Whether more of a figure is better.

    Args:
        path: where it is named
        metric: its name
        described: by the runs; None if by none of them
        asked: what else says the direction, by path: a plan, the command line

    Raises:
        ConfigError: nothing says it, neither is better, or they contradict each other
    """
    return better_of(path, metric, described, *asked) == "more"


def described(results: Iterable[Result], where: str) -> dict[str, Figure]:
    """The figures that runs describe: logged name → its unit and direction.

    Args:
        results: of runs of one sweep
        where: their folder

    Raises:
        ConfigError: two runs describe one figure differently
    """
    found: dict[str, Figure] = {}
    for each in results:
        for name, figure in each.figures.items():
            if (known := found.setdefault(name, figure)).better != figure.better:
                rule = f"holds runs that disagree on {name}: {_way(known)} is better, and {_way(figure)} is"
                raise ConfigError("DIR", where, rule, "Restore its results.json, or leave out the run that was changed")
    return found


def _way(figure: Figure) -> str:
    return figure.better or "neither"
