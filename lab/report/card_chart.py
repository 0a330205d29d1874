"""Charts of a cost card: parameters by family, and cache bytes over the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from blockwright.blocks.cost import cache_bytes, in_order
from blockwright.blocks.decoder import Decoder
from blockwright.lab.report.svg import COLOURS, LINE, Chart, Scale, cut
from blockwright.lab.report.words import short

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
