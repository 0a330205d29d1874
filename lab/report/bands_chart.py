"""How much the tries of a setting have gained: the best of k of them, with opda's bands."""

from __future__ import annotations

import math

from blockwright.lab.report.figure import Figure, colour, end_labels, label_room
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.scale import Scale, padded
from blockwright.lab.report.svg import Chart, Point
from blockwright.lab.report.tuned import Tuned
from blockwright.lab.statistics.tuning_bands import Bands
from blockwright.lab.statistics.tuning_bands import bands as bands_of


def bands(findings: Findings, path: str) -> Figure | None:
    """Median of the best loss of k tries, a line an arm, between thin lines; None without opda, or of gains."""
    tuned = {f.name: each for f in findings.arms for each in f.tuned if each.path == path}
    aim = findings.sweep.aim
    curves = {} if aim.maximize else {name: found for name, each in tuned.items() if (found := _bands(each))}
    shown = [f for f in findings.arms if f.name in curves]
    if not shown:
        return None
    ends = [loss for curve in curves.values() for loss in curve.point]
    most = max(len(curve.point) for curve in curves.values())
    name = next(iter(tuned.values())).name
    title = f"{aim.metric} of the best of k values of the {name}"
    chart = Chart(f"best-of-{path.replace('.', '-')}", title, 280, right=label_room(findings), top=30)
    x, y = Scale(1, most, chart.x0, chart.x1, whole=True), Scale(*padded(ends, 0.3), chart.y0, chart.y1)
    chart.axes(x, y, "tries", f"{aim.metric} of the best of them")
    for f in shown:
        for cls, losses in (("curve seed", curves[f.name].low), ("curve seed", curves[f.name].high)):
            chart.curve(_line(losses), f"{cls} {colour(f, findings)}", f.name)
        chart.curve(_line(curves[f.name].point), f"curve {colour(f, findings)}", f.name)
    end_labels(chart, [(f.name, colour(f, findings), _line(curves[f.name].point)[-1]) for f in shown])
    caption = (
        "Median of the best of so many tries, between bands that hold the whole curve in 95 % (opda), as if the values "
        "had been drawn at random. Where a line still falls, more tries would help. Nothing is tested by it."
    )
    return Figure(chart, "What tuning gained", caption)


def _bands(tuned: Tuned) -> Bands | None:
    return None if tuned.pending else bands_of([each.loss for each in tuned.tries])


def _line(losses: tuple[float, ...]) -> list[Point]:
    return [(k, loss) for k, loss in enumerate(losses, 1) if math.isfinite(loss)]
