"""The charts of a report: lines of arms over the context, as measured and as planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockwright.lab.report.svg import Chart, Figure, Scale, colour_of, end_labels, room_of
from blockwright.plugins.equal_memory.arm import precision
from blockwright.plugins.equal_memory.clock import unit
from blockwright.plugins.equal_memory.results import HEADINGS, Change, Results, Spread
from blockwright.plugins.equal_memory.tables import number

DOT = 3.5  # pixels of a mark's radius
ROOM = 1.2  # factor between the outermost values and the ends of an axis
CAPTION = "Dots: medians of the rounds; bars: the least and the most. Dashed: as planned."


@dataclass(frozen=True)
class Contexts(Scale):
    """A scale whose ticks are the contexts that were measured."""

    marks: tuple[int, ...] = ()

    def ticks(self, most: int) -> list[float]:
        return sorted(self.marks)


@dataclass(frozen=True)
class Line:
    """One arm in a chart.

    Args:
        arm: its name
        measured: context → figure
        planned: context → the planner's
    """

    arm: str
    measured: dict[int, Spread]
    planned: dict[int, float]

    @property
    def values(self) -> list[float]:
        """Everything that is drawn of it."""
        ends = [end for each in self.measured.values() for end in (each.least, each.most)]
        return [*ends, *self.planned.values()]


def speeds(results: Results) -> list[Figure]:
    """Tokens a second, a chart for each precision of the caches."""
    figures = []
    for bits in results.request.settings.bits:
        lines = []
        for arm in results.request.arms:
            rows = {row.cell.context: row for row in results.rows if (row.cell.arm, row.cell.bits) == (arm, bits)}
            speed, planned = ({c: getattr(row, key) for c, row in rows.items()} for key in ("speed", "planned"))
            lines.append(Line(arm, speed, planned))
        chart = Chart(
            f"speed-{bits or 'exact'}", f"Tokens a second, {precision(bits)} caches", 300, right=_right(lines), top=30
        )
        _draw(chart, lines, results, f"tokens a {unit(results.device)}")
        figures.append(Figure(chart, f"Tokens a second, {precision(bits)}", CAPTION))
    return figures


def ratios(results: Results, change: Change) -> list[Figure]:
    """One of the three comparisons, a chart for each precision of the caches."""
    figures = []
    for bits in results.request.settings.bits:
        compared = [each for each in results.comparisons(change) if each.cell.bits == bits]
        lines = []
        for arm in dict.fromkeys(each.cell.arm for each in compared):
            own = {each.cell.context: each for each in compared if each.cell.arm == arm}
            speed, planned = ({c: getattr(each, key) for c, each in own.items()} for key in ("speed", "planned"))
            lines.append(Line(arm, speed, planned))
        if not lines:
            continue
        heading = f"{HEADINGS[change]}: {_against(results, change, precision(bits))}"
        chart = Chart(f"{change}-{bits or 'exact'}", heading, 300, right=_right(lines), top=30)
        _draw(chart, lines, results, "times the tokens a second", even=1.0)
        figures.append(Figure(chart, heading, CAPTION))
    return figures


def _against(results: Results, change: Change, caches: str) -> str:
    """What is compared with what."""
    first, baseline = precision(results.request.settings.bits[0]), results.request.baseline
    return {
        "architecture": f"against {baseline}, both {caches}",
        "bits": f"{caches} against {first}",
        "both": f"{caches} against {baseline}, {first}",
    }[change]


def _right(lines: Sequence[Line]) -> float:
    return room_of([line.arm for line in lines])


def _draw(chart: Chart, lines: Sequence[Line], results: Results, above: str, even: float | None = None) -> None:
    """Draw axes and lines; ``even``, if any, is a value with a line of its own."""
    contexts = results.request.settings.context
    values = [value for line in lines for value in line.values] + ([] if even is None else [even])
    x = Contexts(min(contexts) / ROOM, max(contexts) * ROOM, chart.x0, chart.x1, log=True, marks=contexts)
    y = Scale(min(values) / ROOM, max(values) * ROOM, chart.y0, chart.y1, log=True)
    chart.axes(x, y, "tokens of context", above, lambda tokens: f"{tokens:,.0f}", number)
    if even is not None:
        chart.curve([(x.low, even), (x.high, even)], "zero")
    arms = [results.request.baseline, *(arm for arm in results.request.arms if arm != results.request.baseline)]
    ends = []
    for line in lines:
        cls = colour_of(arms.index(line.arm))
        _line(chart, line, cls)
        ends.append((line.arm, cls, (max(line.measured), line.measured[max(line.measured)].median)))
    end_labels(chart, ends)


def _line(chart: Chart, line: Line, cls: str) -> None:
    chart.curve(sorted(line.planned.items()), f"curve lost {cls}", f"{line.arm}, planned")
    chart.curve([(context, each.median) for context, each in sorted(line.measured.items())], f"curve {cls}", line.arm)
    for context, each in line.measured.items():
        tip = f"{line.arm}, {context:,} tokens: {number(each.median)}; planned: {number(line.planned[context])}"
        chart.bar(cls, chart.at((context, each.least)), chart.at((context, each.most)), tip)
        chart.mark(f"dot {cls}", (context, each.median), DOT, tip)
        chart.mark(f"ring {cls}", (context, line.planned[context]), DOT - 1, tip)
