"""Charts of one run: its losses and the load of its experts, drawn as those of a sweep's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from blockwright.lab.report.experts import load_map
from blockwright.lab.report.learning import EARLY
from blockwright.lab.report.scale import Scale, padded
from blockwright.lab.report.svg import RING, Chart
from blockwright.lab.report.words import short

Points = Sequence[tuple[float, float]]


def losses(train: Points, val: Points, whole: Points = (), unit: str = "nats per token") -> Chart:
    """Training and validation loss over optimizer steps; the fast fall of the first quarter may lie beyond the axis.

    Args:
        train: step and loss of logged batches
        val: step and loss of the windows that are validated during training
        whole: step and loss on the whole validation set, which no curve joins to those of windows
        unit: of the loss
    """
    train, val, whole = ([(at, loss) for at, loss in each if math.isfinite(loss)] for each in (train, val, whole))
    every = [*train, *val, *whole]
    end = max((at for at, _ in every), default=1)
    late = [loss for at, loss in every if at >= EARLY * end] or [0.0]
    title = "Loss over optimizer steps"
    if last := (whole or val)[-1:]:
        title += f": validation {last[0][1]:.4f} after {last[0][0]:,} steps"
    chart = Chart("loss", title, 300, right=86, top=30)
    x, y = _scales(chart, end, late)
    chart.axes(x, y, "optimizer step", f"loss, {unit}", short)
    curves = [("training", "s8", train), *([("validation", "s1", val)] if val else [])]
    area = chart.clipped()
    for name, at, points in curves:
        chart.path([(x(a), y(b)) for a, b in points], f"curve {at}", area, name)
    marks = [("dot s8", train if len(train) == 1 else []), ("dot s1", val), ("ring s1", whole)]
    for cls, points in marks:  # a path of one point is invisible
        for step, loss in points:
            if y(loss) >= chart.y1:
                chart.add("circle", cls, cx=x(step), cy=y(loss), r=RING, tip=f"step {step:,}: {loss:.4f}")
    chart.legend([*((name, f"curve {at}") for name, at, _ in curves), *([("whole set", "ring s1")] if whole else [])])
    return chart


def figures(name: str, curves: Mapping[str, Points]) -> Chart:
    """Other figures of one unit over optimizer steps.

    Args:
        name: of the chart, and what it shows
        curves: name of a figure → its values
    """
    points = [point for curve in curves.values() for point in curve]
    chart = Chart(name, f"{name.capitalize()} over optimizer steps", 260, right=160, top=30)
    values = [value for _, value in points if math.isfinite(value)] or [0.0]
    x, y = _scales(chart, max(at for at, _ in points), values)
    chart.axes(x, y, "optimizer step", name, short)
    area = chart.clipped()
    for number, (label, curve) in enumerate(curves.items(), start=1):
        chart.path([(x(a), y(b)) for a, b in curve if math.isfinite(b)], f"curve s{number}", area, label)
    chart.legend([(label, f"curve s{number}") for number, label in enumerate(curves, start=1)])
    return chart


def _scales(chart: Chart, steps: float, values: Sequence[float]) -> tuple[Scale, Scale]:
    """Of optimizer steps, and of values over them."""
    return Scale(0, max(steps, 1), chart.x0, chart.x1, whole=True), Scale(*padded(values), chart.y0, chart.y1)


def expert_load(shares: Mapping[str, Sequence[float]]) -> Chart:
    """Load of each expert relative to the even load, a row per routed layer; blue is less, orange is more."""
    rows = {layer: [share * len(each) for share in each] for layer, each in shares.items()}
    return load_map("expert-load", "Load of the experts over the even load", rows)
