"""A chart with its caption, and shared elements: colours of arms, names at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.scale import Scale
from blockwright.lab.report.svg import Chart, apart, cut

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
    if finding.is_baseline:
        return "s0"
    at = [f.name for f in findings.others].index(finding.name)
    return f"s{at + 1 if at < COLOURS else COLOURS + 1}"


def label_room(findings: Findings) -> float:
    """Right margin for the arms' names."""
    return 26 + LETTER * max(len(cut(f.name, ENDS)) for f in findings.arms)


def end_labels(chart: Chart, ends: Sequence[tuple[str, str, float, float]], y: Scale) -> None:
    places = apart([min(max(e[3], chart.y1), chart.y0) for e in ends], chart.y1, chart.y0)
    for (name, at, ex, ey), place in zip(ends, places, strict=True):
        chart.add("line", f"leader {at}", x1=ex + 2, x2=chart.x1 + 10, y1=ey, y2=place)
        chart.add("text", "strong" if at == "s0" else "", cut(name, ENDS), tip=name, x=chart.x1 + 13, y=place + 4)
