"""A chart with its caption, and shared elements: colours of arms, names at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.svg import Chart, Point, apart, cut

COLOURS = 7  # distinguishable colours; further arms are grey
ENDS = 16  # letters of a name at the end of a line
LETTER = 7.4  # pixels of a label's letter, about


@dataclass(frozen=True)
class Figure:
    """A chart and its caption."""

    chart: Chart
    heading: str
    caption: str

    @property
    def file(self) -> str:
        return f"{self.chart.name}.svg"


def colour(finding: Finding, findings: Findings) -> str:
    """Class of an arm's colour: the baseline is drawn in ink."""
    return "s0" if finding.is_baseline else colour_of(1 + [f.name for f in findings.others].index(finding.name))


def colour_of(place: int) -> str:
    """Class of the colour of an arm by its place, the baseline's being 0."""
    return f"s{min(place, COLOURS + 1)}"


def label_room(findings: Findings) -> float:
    """Right margin for the arms' names."""
    return room_of([f.name for f in findings.arms])


def room_of(names: Sequence[str]) -> float:
    """Right margin for names."""
    return 26 + LETTER * max(len(cut(name, ENDS)) for name in names)


def end_labels(chart: Chart, ends: Sequence[tuple[str, str, Point]]) -> None:
    """Names to the right of the ends of curves.

    Args:
        chart: with axes
        ends: name, colour and last point of each curve, in values
    """
    pixels = [chart.at(point) for *_, point in ends]
    places = apart([min(max(py, chart.y1), chart.y0) for _, py in pixels], chart.y1, chart.y0)
    for (name, at, _), (ex, ey), place in zip(ends, pixels, places, strict=True):
        chart.add("line", f"leader {at}", x1=ex + 2, x2=chart.x1 + 10, y1=ey, y2=place)
        chart.add("text", "strong" if at == "s0" else "", cut(name, ENDS), tip=name, x=chart.x1 + 13, y=place + 4)
