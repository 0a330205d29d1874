"""A difference in a terminal, or as plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from rich import box
from rich.table import Table
from rich.text import Text

from blockwright.lab.difference import rows
from blockwright.lab.difference.difference import Difference, Runs
from blockwright.lab.difference.entries import Entry
from blockwright.lab.report.words import MINUS
from blockwright.registry import printing

STYLES = {rows.DIFFERS: "bold yellow", rows.SAME: "dim", "": "bold"}
WIDEST = 20  # characters of a name over a column
ONE_SEED = (
    "No verdict: one seed cannot say whether B differs from A, and each is one run. "
    "`blockwright ablate` compares over several seeds."
)


def show(found: Difference) -> None:
    """Print what the models cost and are made of; of two runs, then what they have recorded."""
    out, heads = printing.console(), headers(found.a.name, found.b.name)
    for letter, name, head in zip("AB", (found.a.name, found.b.name), heads, strict=True):
        if head != name:
            out.print(Text(f"{letter}: {name}"))
    _print(heads, "change", [rows.costs(found), rows.composition(found)], same(found.entries))
    if (runs := found.runs) is not None:
        _print(heads, f"B {MINUS} A", [rows.settings(runs), rows.data(runs), rows.figures(runs)], about(runs))


def headers(a: str, b: str) -> tuple[str, str]:
    """Names of the columns: the last part of a path; A and B where these are long, or the same."""
    one, two = (name if " " in name else PurePath(name).name for name in (a, b))  # with overrides, it is no path
    return (one, two) if one != two and max(len(one), len(two)) <= WIDEST else ("A", "B")


def same(entries: Sequence[Entry]) -> str:
    """How many settings are the same."""
    alike = sum(entry.same for entry in entries)
    return f"{alike} settings are the same, {len(entries) - alike} differ."


def about(runs: Runs) -> str:
    """What was compared of two runs, and that it decides nothing."""
    of = "" if runs.whole else " They are those that can change a weight or a figure: one side names a checkpoint."
    return f"{same(runs.settings)}{of}\n{ONE_SEED}"


def _print(heads: tuple[str, str], change: str, sections: Sequence[Sequence[rows.Row]], caption: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, highlight=False, caption=caption, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for head in (*heads, change):
        table.add_column(Text(head), justify="right", overflow="fold")
    for section in sections:
        for row in section:
            table.add_row(*(Text(cell, style=STYLES[row[0]]) for cell in row))
        table.add_section()
    printing.show(table)
