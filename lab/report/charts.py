"""The charts of a report, by section."""

from __future__ import annotations

from collections.abc import Sequence

from blockwright.lab.report.costs import COSTS, trade
from blockwright.lab.report.experts import experts
from blockwright.lab.report.figure import Figure
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.learning import curves, gaps, rates, search
from blockwright.lab.report.pairs import differences
from blockwright.lab.report.reach import reach
from blockwright.lab.report.sight import sight


def draw(findings: Findings) -> dict[str, list[Figure]]:
    """Section → its charts, without those that have no data."""
    if findings.sweep.kind == "search":
        return {"search": _some([search(findings)])}
    return {
        "differences": _some([differences(findings)]),
        "curves": _some([curves(findings, "tokens"), curves(findings, "flops"), gaps(findings)]),
        "trade": _some([trade(findings, cost) for cost in COSTS]),
        "rates": _some([rates(findings)]),
        "reach": [figure for i, finding in enumerate(findings.arms) for figure in reach(i, finding)],
        "sight": [figure for i, finding in enumerate(findings.arms) for figure in sight(i, finding)],
        "experts": _some([experts(i, finding) for i, finding in enumerate(findings.arms)]),
    }


def _some(figures: Sequence[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]
