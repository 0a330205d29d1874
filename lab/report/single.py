"""Charts of one run: its losses and the load of its experts, drawn as those of a sweep's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from blockwright.lab.report.learning import EARLY, load_map
from blockwright.lab.report.svg import RING, Chart, Scale, padded
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
    _step_axes(chart, end, late, f"loss, {unit}")
    chart.curve(train, "curve s8", "training")
    chart.curve(val, "curve s1", "validation")
    marks = [("dot s8", train if len(train) == 1 else []), ("dot s1", val), ("ring s1", whole)]
    for cls, points in marks:  # a curve of one point is invisible
        for step, loss in points:
            chart.mark(cls, (step, loss), RING, f"step {step:,}: {loss:.4f}")
    shown = [("training", "curve s8", train), ("validation", "curve s1", val), ("whole set", "ring s1", whole)]
    chart.legend([(name, cls) for name, cls, points in shown if points])
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
    _step_axes(chart, max(at for at, _ in points), values, name)
    for number, (label, curve) in enumerate(curves.items(), start=1):
        chart.curve([(at, value) for at, value in curve if math.isfinite(value)], f"curve s{number}", label)
    chart.legend([(label, f"curve s{number}") for number, label in enumerate(curves, start=1)])
    return chart


def _step_axes(chart: Chart, steps: float, values: Sequence[float], above: str) -> None:
    """Axes of optimizer steps, and of values over them."""
    x = Scale(0, max(steps, 1), chart.x0, chart.x1, whole=True)
    chart.axes(x, Scale(*padded(values), chart.y0, chart.y1), "optimizer step", above, short)


def expert_load(shares: Mapping[str, Sequence[float]]) -> Chart:
    """Load of each expert relative to the even load, a row per routed layer; blue is less, orange is more."""
    rows = {layer: [share * len(each) for share in each] for layer, each in shares.items()}
    return load_map("expert-load", "Load of the experts over the even load", rows)
