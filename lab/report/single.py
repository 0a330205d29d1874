"""Charts of one run (its losses, the load of its experts) and of a cost card (parameters, cache over the context)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from blockwright.blocks.cost import cache_bytes, in_order
from blockwright.blocks.decoder import Decoder
from blockwright.lab.report.svg import COLOURS, EARLY, LINE, RING, Chart, Scale, cut, load_map, padded
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


BAR, GAP = 18, 12  # pixels of a model's bar, and to the next
NAMES = 118  # pixels of the models' names
Models = Sequence[Mapping[str, Any]]


def families(models: Models) -> Chart:
    """A bar per model, cut into families, with a mark at its active parameters."""
    sizes = [{f: n for f, n in model["parameters"]["families"].items() if n} for model in models]
    shown = [name for name in in_order(f for size in sizes for f in size) if any(name in size for size in sizes)]
    top = 30 + LINE * ((len(shown) + 2) // 3) + 6
    chart = Chart("families", "Parameters by family", top + (BAR + GAP) * len(models) + 46, NAMES, top=top)
    x = Scale(0, max(sum(size.values()) for size in sizes), chart.x0, chart.x1)
    chart.axes(x, None, "parameters; the mark: active for a token", written=short)
    for i, family in enumerate(shown):
        at = (8 + 144 * (i % 3), 26 + LINE * (i // 3))
        chart.add("rect", f"block {colour(i)}", x=at[0], y=at[1] - 9, width=10, height=10)
        chart.add("text", "tick", family.replace("_", " "), x=at[0] + 15, y=at[1])
    for row, (model, size) in enumerate(zip(models, sizes, strict=True)):
        y, start = chart.y1 + (BAR + GAP) * row + GAP / 2, 0
        chart.add("text", "end", cut(model["model"], 16), tip=model["model"], x=chart.x0 - 8, y=y + 13)
        for i, family in enumerate(shown):
            if count := size.get(family, 0):
                tip = f"{model['model']}, {family.replace('_', ' ')}: {count:,}"
                width = x(start + count) - x(start)
                chart.add("rect", f"block {colour(i)}", tip=tip, x=x(start), y=y, width=width, height=BAR)
            start += count
        active = model["parameters"]["active"]
        tip = f"{model['model']}: {active:,} active"
        chart.add("line", "zero", tip=tip, x1=x(active), x2=x(active), y1=y - 4, y2=y + BAR + 4)
    return chart


def caches(models: Models, decoders: Sequence[Decoder]) -> Chart | None:
    """Bytes of one sequence's cache at every power of two up to 128K tokens, or the given context."""
    lines = [
        (model["model"], _cache(model, decoder))
        for model, decoder in zip(models, decoders, strict=True)
        if model["cache"]["elements_per_token"] is not None
    ]
    drawn = [(name, line) for name, line in lines if all(size > 0 for _, size in line)]
    if not drawn:
        return None
    chart = Chart("caches", "Cache of one sequence", 300, right=130, top=30)
    ends = [size for _, line in drawn for _, size in line]
    last = max(line[-1][0] for _, line in drawn)
    x = Scale(drawn[0][1][0][0], last, chart.x0, chart.x1, log=True)
    y = Scale(min(ends) / 1.3, max(ends) * 1.3, chart.y0, chart.y1, log=True)
    chart.axes(x, y, "tokens cached", "bytes of one sequence's cache", short, short)
    for i, (name, line) in enumerate(drawn):
        chart.curve(line, f"curve {colour(i)}", name)
    chart.legend([(name, f"curve {colour(i)}") for i, (name, _) in enumerate(drawn)])
    return chart


def colour(index: int) -> str:
    """A class of chart.css: seven colours, grey, ink."""
    return f"s{(index + 1) % (COLOURS + 2)}"


def _cache(model: Mapping[str, Any], decoder: Decoder) -> list[tuple[int, float]]:
    longest, bits = max(131_072, model["cache"]["context"]), model["cache"]["bits"]
    lengths = [2**i for i in range(5, longest.bit_length())]
    return [(length, cache_bytes(decoder, length, torch.float32) / 4 * bits / 8) for length in lengths]
