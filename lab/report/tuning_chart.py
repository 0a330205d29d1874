"""The tries of a tuned setting, with the curve through the best of them."""

from __future__ import annotations

import math

from blockwright.lab.report.findings import Findings, Tuned
from blockwright.lab.report.svg import RING, Chart, Figure, Point, Scale, colour, end_labels, label_room, padded
from blockwright.lab.report.words import plain
from blockwright.lab.statistics.tuning import Bands
from blockwright.lab.statistics.tuning import bands as bands_of

# --- how much the tries of a setting have gained: the best of k of them, with opda's bands ----------------------------


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
