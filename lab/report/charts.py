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


@dataclass(frozen=True)
class Drawing:
    """Charts of every arm, a section of a report that a package offers in the entry points ``blockwright.charts``.

    Args:
        title: of the section
        draw: the number of an arm and the arm → its charts
    """

    title: str
    draw: Callable[[int, Finding], list[Figure]]

    def of(self, findings: Findings) -> list[Figure]:
        """The charts of all arms."""
        return [figure for number, finding in enumerate(findings.arms) for figure in self.draw(number, finding)]


def offered() -> dict[str, Drawing]:
    """Name of a section → its drawing, in alphabetical order."""
    return {point.name: point.load() for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name)}


def _some(figures: Sequence[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]
