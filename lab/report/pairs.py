"""Each arm against the baseline, seed by seed."""

from __future__ import annotations

from blockwright.lab.report.figure import LETTER, Figure, colour
from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.scale import Scale, padded
from blockwright.lab.report.svg import Chart, cut
from blockwright.lab.report.words import around, signed


def differences(findings: Findings) -> Figure | None:
    """Each arm's paired differences to the baseline: a ring per seed, a dot for the mean, a bar for its interval."""
    shown = [f for f in findings.others if f.comparison is not None]
    if not shown:
        return None
    metric, row = findings.sweep.metric, 30
    others = list(dict.fromkeys(f.against for f in shown))
    other, named = others[0] if len(others) == 1 else "its own", " or ".join(others)
    left = 16 + LETTER * max(len(cut(f.name, 18)) for f in shown)
    chart = Chart("differences", f"{metric}: differences to {named}", row * len(shown) + 66, left=left, top=22)
    values = [0.0, *(v for f in shown if f.comparison for v in _reach(f))]
    x = Scale(*padded(values), chart.x0, chart.x1)
    better = "right" if findings.sweep.maximize else "left"
    of = f", {findings.sweep.unit}" if findings.sweep.unit else ""
    chart.axes(x, None, f"difference in {metric}{of} ({better} is better)")
    chart.add("line", "zero", x1=x(0), x2=x(0), y1=chart.y1 - 4, y2=chart.y0)
    chart.add("text", "name mid", cut(other, 16), x=min(max(x(0), chart.x0 + 30), chart.x1 - 30), y=13)
    for i, finding in enumerate(shown):
        _difference_row(chart, finding, findings, x, chart.y1 + row * (i + 0.5))
    level = "interval at the level of its look" if findings.sweep.design.looks else "95 % interval"
    caption = (
        f"Rings: each seed, against the same seed of {named}. Dot and bar: their mean and its {level}. "
        "A bar that crosses the line tells nothing from noise; one with an arrow continues beyond the axis."
    )
    return Figure(chart, "Paired differences", caption)


def _reach(finding: Finding) -> list[float]:
    """Range of the axis; an interval far beyond its own seeds is cut, so that the rest stays visible."""
    assert finding.comparison is not None
    values, found = list(finding.comparison.by_seed.values()), finding.comparison.difference
    if found.low is None or found.high is None:
        return values
    widest = 2.5 * max(max(map(abs, values)), 1e-12)
    return [*values, max(found.low, -widest), min(found.high, widest)]


def _difference_row(chart: Chart, finding: Finding, findings: Findings, x: Scale, at: float) -> None:
    assert finding.comparison is not None
    cls, found = colour(finding, findings), finding.comparison.difference
    chart.add("line", "grid", x1=chart.x0, x2=chart.x1, y1=at, y2=at)
    chart.add("text", "end", cut(finding.name, 18), tip=finding.name, x=chart.x0 - 9, y=at + 4)
    if found.low is not None and found.high is not None:
        chart.bar(cls, (x(found.low), at), (x(found.high), at), around(found, sign=True))
    for seed, value in finding.comparison.by_seed.items():
        tip = f"seed {seed}: {signed(value, 4)}"
        chart.add("circle", f"ring {cls}", cx=x(value), cy=at - 8 if found.n > 1 else at, r=3.2, tip=tip)
    if found.n > 1:
        chart.add("circle", f"dot {cls}", cx=x(found.mean), cy=at, r=5, tip=around(found, sign=True))
