"""Charts of one run: its losses and the load of its experts, drawn as those of a sweep's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from blockwright.lab.report.experts import load_map
from blockwright.lab.report.learning import EARLY
from blockwright.lab.report.svg import Chart, Scale, padded
from blockwright.lab.report.words import short

Points = Sequence[tuple[float, float]]


def losses(train: Points, val: Points, unit: str = "nats a token") -> Chart:
    """Training and validation loss over optimizer steps; the fast fall of the first quarter may lie beyond the axis."""
    end = max(at for at, _ in (*train, *val))
    finite = [(at, loss) for at, loss in (*train, *val) if math.isfinite(loss)]
    late = [loss for at, loss in finite if at >= EARLY * end] or [loss for _, loss in finite] or [0.0]
    last = next(((loss, at) for at, loss in reversed(val) if math.isfinite(loss)), None)
    title = "Loss over optimizer steps" + (f": validation {last[0]:.4f} after {last[1]:,} steps" if last else "")
    chart = Chart("loss", title, 300, right=86, top=30)
    x, y = Scale(0, max(end, 1), chart.x0, chart.x1), Scale(*padded(late), chart.y0, chart.y1)
    chart.axes(x, y, "optimizer step", f"loss, {unit}", short)
    area = chart.clipped()
    for name, at, points in (("training", "s8", train), ("validation", "s1", val)):
        line = [(x(a), y(b)) for a, b in points if math.isfinite(b)]
        chart.path(line, f"curve {at}", area, name)
        if name == "validation" or len(line) == 1:  # a path of one point is invisible
            for (px, py), (step, loss) in zip(line, [p for p in points if math.isfinite(p[1])], strict=True):
                if py >= chart.y1:
                    chart.add("circle", f"dot {at}", cx=px, cy=py, r=3.5, tip=f"step {step:,}: {loss:.4f}")
    chart.legend((("training", "s8"), ("validation", "s1")) if val else (("training", "s8"),))
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
    x = Scale(0, max(1, *(at for at, _ in points)), chart.x0, chart.x1)
    y = Scale(*padded(values), chart.y0, chart.y1)
    chart.axes(x, y, "optimizer step", name, short)
    area = chart.clipped()
    for number, (label, curve) in enumerate(curves.items(), start=1):
        chart.path([(x(a), y(b)) for a, b in curve if math.isfinite(b)], f"curve s{number}", area, label)
    chart.legend([(label, f"s{number}") for number, label in enumerate(curves, start=1)])
    return chart


def expert_load(shares: Mapping[str, Sequence[float]]) -> Chart:
    """Load of each expert relative to the even load, a row per routed layer; blue is less, orange is more."""
    rows = {layer: [share * len(each) for share in each] for layer, each in shares.items()}
    return load_map("expert-load", "Load of the experts over the even load", rows)
