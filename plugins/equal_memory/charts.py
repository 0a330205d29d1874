"""The charts of a report: lines of arms over the context, as measured and as planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockwright.lab.card import in_bytes, scaled
from blockwright.lab.report.svg import Chart, Figure, Scale, colour_of, end_labels, room_of
from blockwright.lab.report.tables import Table, row
from blockwright.lab.report.words import percent
from blockwright.plugins.equal_memory.arm import precision
from blockwright.plugins.equal_memory.race import unit
from blockwright.plugins.equal_memory.results import HEADINGS, Change, Comparison, Results, Row, Spread

# --- the tables of a report -------------------------------------------------------------------------------------------


EXACT = 100.0  # from this number on, digits after the point say nothing


def number(value: float) -> str:
    """A rate or a ratio in three digits or more."""
    return f"{value:,.0f}" if value >= EXACT else f"{value:.3g}"


def spread(found: Spread, unit: str = "") -> str:
    """A median, and the least and the most behind it."""
    return f"{number(found.median)}{unit} ({number(found.least)} to {number(found.most)})"


def cells(results: Results) -> Table:
    """Every cell beside the roofline and the plan."""
    columns = (
        "arm", "context", "caches", "bytes a sequence", "sequences", "planned sequences", "ms a step", "tokens/s",
        "of the roofline", "planned tokens/s",
    )  # fmt: skip
    note = (
        "tokens/s: median of the rounds, the least and the most. Roofline: the same sequences, if reading and "
        "computing overlap at the rates of this machine. Planned: a step that waits for products, then for attention; "
        "in brackets how far it is off."
    )
    rows = tuple(row(*_cells(each, results)) for each in results.rows)
    return Table("Full batches", columns, rows, frozenset(columns) - {"arm", "caches"}, note=note)


def _cells(each: Row, results: Results) -> Iterable[str]:
    turns = each.turns
    return (
        each.cell.arm,
        f"{each.cell.context:,}",
        precision(each.cell.bits),
        in_bytes(turns.row_bytes),
        f"{turns.rows:,}",
        f"{each.planned_rows:,} ({percent(each.rows_off)})",
        number(1e3 * turns.rows / each.speed.median),
        spread(each.speed),
        f"{each.speed.median / each.roofline:.1%}",
        f"{number(each.planned)} ({number(1 + each.off)} ×)",
    )


def comparisons(results: Results, change: Change) -> Table | None:
    """One of the three comparisons; None where nothing differs in this way."""
    columns = ("arm", "against", "context", "bytes saved", "sequences", "tokens/s", "planned")
    rows = tuple(row(*_compared(each)) for each in results.comparisons(change))
    return Table(HEADINGS[change], columns, rows, frozenset(columns[2:])) if rows else None


def _compared(each: Comparison) -> Iterable[str]:
    return (
        each.cell.name,
        each.against.name,
        f"{each.cell.context:,}",
        f"{each.saved:.1%}",
        f"{number(each.rows)} ×",
        spread(each.speed, " ×"),
        f"{number(each.planned)} ×",
    )


def claims(results: Results) -> Table:
    """What the paper claims, what the planner says of it, and the widest change that was measured."""
    columns = ("", "bytes saved", "sequences", "tokens/s")
    rows = [
        row(
            claim.name,
            "–" if claim.saved is None else f"{claim.saved:.1%}",
            "–" if claim.rows is None else f"{number(claim.rows)} ×",
            f"{number(claim.speed)} ×",
        )
        for claim in results.claims
    ]
    for each in widest(results):
        name = f"measured here, {each.cell.context:,} tokens: {each.cell.name} against {each.against.name}"
        rows.append(row(name, f"{each.saved:.1%}", f"{number(each.rows)} ×", spread(each.speed, " ×")))
    note = (
        "The paper's figure is of serving in production, where weights take a part of the memory and a smaller part in "
        "8 bits. What is measured here fills the memory with caches alone."
    )
    return Table("The paper's claim", columns, tuple(rows), frozenset(columns[1:]), frozenset(columns[:1]), note)


def fastest(results: Results, change: Change) -> Comparison | None:
    """The comparison with the highest ratio at the longest context; None where nothing differs in this way."""
    longest = max(results.request.settings.context)
    compared = [each for each in results.comparisons(change) if each.cell.context == longest]
    return max(compared, key=lambda each: each.speed.median, default=None)


def widest(results: Results) -> list[Comparison]:
    """At the longest context: arms that differ from the baseline in architecture and bits; if none, in one of them."""
    longest = max(results.request.settings.context)
    every = [results.comparisons(change) for change in ("both", "architecture", "bits")]
    return [each for each in next(filter(None, every), []) if each.cell.context == longest]


def machine(results: Results) -> Table:
    """The rates of the machine."""
    columns = ("context", "products, FLOP/s", "reading, bytes/s")
    rows = tuple(
        row(f"{context:,}", scaled(peaks.flops), scaled(peaks.read)) for context, peaks in results.peaks.items()
    )
    note = "Medians over the rounds of each context, by the same clock and with the same threads and dtype as the arms."
    return Table("The machine", columns, rows, frozenset(columns), note=note)


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
