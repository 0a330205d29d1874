"""The report: a page, the same as Markdown, charts, every turn as CSV, and the document of ``--json``."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from rich import box
from rich.table import Table as Shown

from blockwright.lab.card import in_bytes, scaled
from blockwright.lab.report import terminal
from blockwright.lab.report.page import Head, Section, save, some
from blockwright.lab.report.tables import Table
from blockwright.lab.report.verdict import as_json
from blockwright.plugins.equal_memory import charts
from blockwright.plugins.equal_memory.charts import fastest, number, spread
from blockwright.plugins.equal_memory.race import unit
from blockwright.plugins.equal_memory.results import HEADINGS, Comparison, Results
from blockwright.registry import printing

JSON = "throughput.json"
TITLE = "Throughput at equal memory"


def write(folder: Path, results: Results) -> Path:
    """Write ``folder/report/``; returns its page.

    Raises:
        ConfigError: it cannot be written
    """
    files = {"runs.csv": turns(results), JSON: f"{as_json(results.as_plain())}\n"}
    return save(folder, head(results, folder), arrange(results), files)


def show(results: Results, page: Path) -> None:
    """Print the tables and the head of the report."""
    for table in (charts.cells(results), *_comparisons(results), charts.claims(results)):
        printing.show(_shown(table))
    terminal.show_head(head(results, page.parent.parent), page)


def _shown(table: Table) -> Shown:
    """A table of a report for the terminal."""
    shown = Shown(box=box.SIMPLE_HEAD, title=table.title, caption=table.note, caption_justify="left", highlight=False)
    for column in table.columns:
        shown.add_column(column, justify="right" if column in table.numeric else "left", overflow="fold")
    for each in table.rows:
        shown.add_row(*("".join(part.text for part in cell) for cell in each.cells))
    return shown


def _comparisons(results: Results) -> list[Table]:
    return [table for change in HEADINGS for table in some(charts.comparisons(results, change))]


def head(results: Results, folder: Path) -> Head:
    """The top of the report: of each comparison the fastest, and how well it was planned."""
    best = [each for change in HEADINGS if (each := fastest(results, change)) is not None]
    # How far off the planner is at worst
    rows = max(abs(row.rows_off) for row in results.rows)
    low, high = (f"{number(1 + choose(row.off for row in results.rows))} ×" for choose in (min, max))
    text = f"Its sequences are within {rows:.1%} of those that fit, its tokens/s {low} to {high} of those measured."
    plan = {"kind": "baseline", "label": "the plan", "text": text}
    return Head(
        title=TITLE,
        kind="Throughput",
        name=TITLE,
        metric=f"tokens a {unit(results.device)}",
        better="more is better",
        state="",
        headline=[*map(_sentence, best), plan],
        method=method(results),
        command=results.request.command,
        directory=str(folder),
        verdicts=False,
    )


def _sentence(each: Comparison) -> dict[str, str]:
    text = (
        f"{HEADINGS[each.change]}, {each.cell.context:,} tokens: {each.cell.name} decodes "
        f"{spread(each.speed, ' ×')} the tokens of {each.against.name}, with {number(each.rows)} × the sequences; "
        f"planned: {number(each.planned)} ×."
    )
    labels = {"better": "faster", "worse": "slower", "undecided": "undecided"}
    return {"kind": each.verdict, "label": labels[each.verdict], "text": text}


def method(results: Results) -> str:
    """How the figures were measured."""
    settings = results.request.settings
    rates = results.peaks[max(results.peaks)]
    on = f"{settings.threads} thread{'s' * (settings.threads > 1)}" if results.device.type == "cpu" else "a GPU"
    return (
        f"{in_bytes(settings.budget)} of caches for each arm, weights apart; {settings.dtype} on {on}, torch "
        f"{torch.__version__}: {scaled(rates.flops)}FLOP/s in products, {scaled(rates.read)}B/s in reading. Turns of "
        f"{settings.steps} steps alternate over {settings.repeats} rounds. A figure is the median (the least to the "
        "most); ratios are of turns in the same round."
    )


def arrange(results: Results) -> list[Section]:
    """The sections of the page, in order."""
    compared = [
        Section(change, heading, charts.ratios(results, change), some(charts.comparisons(results, change)))
        for change, heading in HEADINGS.items()
    ]
    return [
        *(section for section in compared if section.tables),
        Section("paper", "The paper's claim", [], [charts.claims(results)]),
        Section("batches", "Full batches, and what was planned", charts.speeds(results), [charts.cells(results)]),
        Section("machine", "The machine", [], [charts.machine(results)]),
    ]


def turns(results: Results) -> str:
    """Every turn as CSV."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(
        [
            "context",
            "arm",
            "bits",
            "round",
            "rows",
            "sequence_bytes",
            "caches_bytes",
            "processor_seconds",
            "wall_seconds",
        ]
    )
    for row in results.rows:
        cell, own = row.cell, row.turns
        for turn, each in enumerate(own.seconds):
            sizes = [own.rows, own.row_bytes, own.bytes, each.processor, each.wall]
            writer.writerow([cell.context, cell.arm, cell.bits or "exact", turn, *sizes])
    return file.getvalue()
