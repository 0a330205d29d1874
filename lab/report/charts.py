"""The charts of a report, by section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from blockwright.lab.report.bands_chart import bands
from blockwright.lab.report.costs import COSTS, trade
from blockwright.lab.report.experts import experts
from blockwright.lab.report.figure import Figure
from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.learning import curves, gaps, search
from blockwright.lab.report.pairs import differences
from blockwright.lab.report.tables import Table
from blockwright.lab.report.tuning_chart import paths, tuning

ENTRY_POINTS = "blockwright.charts"


def draw(findings: Findings) -> dict[str, list[Figure]]:
    """Section → its charts, without those that have no data."""
    if findings.sweep.kind == "search":
        return {"search": _some([search(findings)])}
    return {
        "differences": _some([differences(findings)]),
        "curves": _some([curves(findings, "tokens"), curves(findings, "flops"), gaps(findings)]),
        "trade": _some([trade(findings, cost) for cost in COSTS]),
        "tuning": _some([chart(findings, path) for path in paths(findings) for chart in (tuning, bands)]),
        "experts": _some([experts(i, finding) for i, finding in enumerate(findings.arms)]),
    }


def no_tables(findings: Findings) -> list[Table]:
    """Of a section of charts alone."""
    return []


@dataclass(frozen=True)
class Drawing:
    """A section of a report that a package offers in the entry points ``blockwright.charts``.

    Args:
        title: of the section
        draw: its charts; ``of_each`` makes it of a function of one arm
        tabulate: its tables
    """

    title: str
    draw: Callable[[Findings], list[Figure]]
    tabulate: Callable[[Findings], list[Table]] = no_tables


def of_each(draw: Callable[[int, Finding], list[Figure]]) -> Callable[[Findings], list[Figure]]:
    """The charts of all arms.

    Args:
        draw: the number of an arm and the arm → its charts
    """
    return lambda findings: [figure for number, arm in enumerate(findings.arms) for figure in draw(number, arm)]


def offered() -> dict[str, Drawing]:
    """Name of a section → its drawing, in alphabetical order."""
    return {point.name: point.load() for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name)}


def _some(figures: Sequence[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]
