"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterable

from blockwright.lab.card import in_bytes, scaled
from blockwright.lab.report.tables import Table, row
from blockwright.lab.report.words import percent
from blockwright.plugins.equal_memory.arm import precision
from blockwright.plugins.equal_memory.results import HEADINGS, Change, Comparison, Results, Row, Spread

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
