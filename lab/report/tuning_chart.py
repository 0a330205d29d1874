"""The tries of a tuned setting, with the curve through the best of them."""

from __future__ import annotations

import math

from blockwright.lab.report.figure import Figure, colour, end_labels, label_room
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.scale import Scale, padded
from blockwright.lab.report.svg import RING, Chart, Point
from blockwright.lab.report.tuned import Tuned
from blockwright.lab.report.words import plain

STEPS = 24  # of a drawn parabola
OCTAVES = 1.0  # drawn on either side of its vertex
SHOWN = 3  # best tries of each arm that the axis has room for
LEAST_ROOM = 0.01  # share of the loss; a flat curve is not magnified into noise


def paths(findings: Findings) -> list[str]:
    """The settings that were tuned."""
    return list(dict.fromkeys(each.path for f in findings.arms for each in f.tuned))


def tuning(findings: Findings, path: str) -> Figure | None:
    """Figure over setting: a ring per try, the fitted curve, a dot at the value at which the arm is compared."""
    aim = findings.sweep.aim
    tuned = {f.name: each for f in findings.arms for each in f.tuned if each.path == path}
    points = {name: _points(each, aim.maximize) for name, each in tuned.items()}
    every = [point for found in points.values() for point in found]
    if len({value for value, _ in every}) < 2:
        return None
    name, metric = next(iter(tuned.values())).name, aim.metric
    named = "learning rate" if name == "rate" else name
    chart = Chart(f"tuning-{path.replace('.', '-')}", f"{metric} over {named}", 280, right=label_room(findings), top=30)
    values = [value for value, _ in every]
    x = Scale(min(values) / 1.15, max(values) * 1.15, chart.x0, chart.x1, log=True)
    near = [figure for found in points.values() for figure in _best(found, aim.maximize)]
    y = Scale(*padded(near, least=LEAST_ROOM), chart.y0, chart.y1)
    chart.axes(x, y, named, metric, lambda v: f"{v:g}")
    for f in findings.arms:
        if f.name in tuned:
            _arm(chart, f.name, tuned[f.name], points[f.name], colour(f, findings), aim.maximize)
    end_labels(chart, [(f.name, colour(f, findings), points[f.name][-1]) for f in findings.arms if points.get(f.name)])
    caption = (
        "Rings: tries, the worst of which may be beyond the axis. Line: the curve through the best of them, over "
        "octaves; thin where the best is the last one tried. Filled: where the arm is compared."
    )
    return Figure(chart, f"Tuning of the {named}", caption)


def _points(tuned: Tuned, maximize: bool) -> list[Point]:
    """(value, figure) of the tries that ended well."""
    return [(each.value, -each.loss if maximize else each.loss) for each in tuned.tries if math.isfinite(each.loss)]


def _best(points: list[Point], maximize: bool) -> list[float]:
    """The best figures of an arm; a curve that falls far would leave no room for the others."""
    return sorted((figure for _, figure in points), reverse=maximize)[:SHOWN]


def _arm(chart: Chart, name: str, tuned: Tuned, points: list[Point], cls: str, maximize: bool) -> None:
    for value, figure in points:
        chart.mark(f"ring {cls}", (value, figure), RING, f"{name}, {value:.3g}: {plain(figure)}")
    fit = tuned.fit
    if fit is None or tuned.edge:
        chart.curve(points, f"curve seed {cls}", name)
        return

    def at(value: float) -> Point:
        return value, bottom + curvature * math.log2(value / fit.vertex) ** 2

    curvature = -fit.curvature if maximize else fit.curvature
    bottom = _bottom(points, fit.vertex, curvature)
    values = [fit.vertex * 2 ** (OCTAVES * (2 * i / STEPS - 1)) for i in range(STEPS + 1)]
    chart.curve([at(value) for value in values if chart.x.low <= value <= chart.x.high], f"curve {cls}", name)
    if tuned.used is not None:
        chart.mark(f"dot {cls}", at(tuned.used), 5.0, f"{name}, compared at {tuned.used:.3g}")


def _bottom(points: list[Point], vertex: float, curvature: float) -> float:
    """The figure at the vertex: of the parabola that fits the three tries nearest to it."""
    near = sorted((abs(math.log2(value / vertex)), figure) for value, figure in points)[:3]
    return math.fsum(figure - curvature * octaves**2 for octaves, figure in near) / len(near)
