"""The heat map of a reading test: accuracy at each length and depth."""

from __future__ import annotations

from blockwright.lab.report.svg import Chart
from blockwright.plugins.long_context.reading.reading import Reading

ROW = 24  # pixels of a depth


def heat_map(reading: Reading, name: str, heading: str = "") -> Chart:
    """A column per length, a row per depth; the fuller the colour, the more answers are right.

    Args:
        reading: what a test found, teacher-forced
        name: of the chart's file
        heading: for screen readers; the test's name by default
    """
    depths: list[float | None] = [*reading.depths] or [None]
    chart = Chart(
        name, heading or f"{reading.test}: right answers", ROW * len(depths) + 76, left=62, right=14, top=22, bottom=54
    )
    across = (chart.x1 - chart.x0) / len(reading.lengths)
    for i, depth in enumerate(depths):
        at = chart.y1 + ROW * i
        chart.add("text", "tick end", "all" if depth is None else f"{100 * depth:g} %", x=chart.x0 - 7, y=at + 16)
        for column, (length, row) in enumerate(zip(reading.lengths, reading.teacher_forced, strict=True)):
            where = "" if depth is None else f", depth {100 * depth:g} %"
            _cell(chart, chart.x0 + across * column, at, across - 1, row[i], f"{length:,} tokens{where}: {row[i]:.2f}")
    for column, length in enumerate(reading.lengths):
        x, mean = chart.x0 + across * (column + 0.5), reading.mean(length)
        chart.add("text", "tick mid", written(length), x=x, y=chart.y0 + 15)
        chart.add("text", "strong mid", f"{mean:.2f}", x=x, y=chart.y0 + 31, tip=f"{length:,} tokens: mean {mean:.3f}")
    chart.add("text", "name", "depth" if reading.depths else "", x=4.0, y=chart.y1 - 8)
    chart.add("text", "name mid", "tokens, and the mean", x=(chart.x0 + chart.x1) / 2, y=chart.height - 3)
    return chart


def written(length: int) -> str:
    """A length with a suffix: 4k for 4096."""
    for size, suffix in ((2**20, "M"), (2**10, "k")):
        if length % size == 0:
            return f"{length // size}{suffix}"
    return str(length)


def _cell(chart: Chart, x: float, y: float, width: float, share: float, tip: str) -> None:
    chart.add("rect", "under", x=x, y=y, width=width, height=ROW - 1.0, fill_opacity=0.85 * share)
    chart.add("rect", "frame", tip=tip, x=x, y=y, width=width, height=ROW - 1.0)
    if width >= 26:
        chart.add("text", "mid", f"{share:.2f}", x=x + width / 2, y=y + 16)
