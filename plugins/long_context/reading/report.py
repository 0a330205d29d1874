"""What a reading test found, without a model: figures, and heat maps of how far each arm of a report reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blockwright.lab.report.charts import Drawing, of_each
from blockwright.lab.report.findings import Finding
from blockwright.lab.report.svg import Chart, Figure
from blockwright.lab.report.sweep import Run
from blockwright.lab.report.words import seeds
from blockwright.registry.folder import read_json

FILE = "reading.json"  # of a run


@dataclass
class Reading:
    """What one test found.

    Args:
        test: its name
        lengths: tokens of the prompts
        depths: empty for a test without depths, whose rows have one value
        teacher_forced: share of the answers' tokens that are the likeliest, given the right ones before; a row per
            length, a value per depth
        generated: share of the answers that occur in a greedily generated text of their length; None if not measured
    """

    test: str
    lengths: list[int]
    depths: list[float]
    teacher_forced: list[list[float]] = field(default_factory=list)
    generated: list[list[float]] | None = None

    def mean(self, length: int) -> float:
        """The mean over depths at a length."""
        row = self.teacher_forced[self.lengths.index(length)]
        return sum(row) / len(row)

    def as_plain(self) -> dict[str, Any]:
        return dict(vars(self))


# --- the heat map of a reading test: accuracy at each length and depth ------------------------------------------------


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


def reach(index: int, finding: Finding) -> list[Figure]:
    """A heat map for each reading test that all runs of an arm have made, mean over seeds."""
    found = [readings for run in finding.runs if run.seed in finding.values and (readings := _readings(run))]
    tests = [test for test in found[0] if all(test in readings for readings in found)] if found else []
    figures = []
    for test in tests:
        mean = _mean([readings[test] for readings in found])
        if mean is not None:
            heading = f"{finding.name}: {test}"
            caption = (
                f"Right tokens of the answers by length and depth, mean of {seeds(len(found))}; below: over depths."
            )
            figures.append(Figure(heat_map(mean, f"reading-{index}-{test}", heading), heading, caption))
    return figures


def _readings(run: Run) -> dict[str, Reading]:
    """The reading tests of a run; empty if it has made none, or its file is damaged."""
    try:
        assert run.folder is not None
        tests = read_json(run.folder, FILE)["tests"]
        return {test["test"]: _checked(test) for test in tests}
    except (AssertionError, OSError, ValueError, KeyError, TypeError):
        return {}


def _checked(test: dict[str, Any]) -> Reading:
    rows = [[float(value) for value in row] for row in test["teacher_forced"]]
    lengths, depths = [int(n) for n in test["lengths"]], [float(d) for d in test["depths"]]
    if len(rows) != len(lengths) or any(len(row) != max(1, len(depths)) for row in rows):
        raise ValueError("the grid has not its lengths and depths")
    return Reading(str(test["test"]), lengths, depths, rows)


def _mean(found: Sequence[Reading]) -> Reading | None:
    """The mean of grids of the same cells; None if they differ."""
    first = found[0]
    if any((other.lengths, other.depths) != (first.lengths, first.depths) for other in found):
        return None
    rows = [
        [math.fsum(cells) / len(cells) for cells in zip(*(other.teacher_forced[i] for other in found), strict=True)]
        for i in range(len(first.lengths))
    ]
    return Reading(first.test, first.lengths, first.depths, rows)


REACH = Drawing("How far they read", of_each(reach))
