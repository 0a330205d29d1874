"""The report in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from blockwright.lab.report import build
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.page import Head
from blockwright.registry import printing

STYLES = {
    "better": "bold green",
    "worse": "red",
    "baseline": "bold",
    "same": "green",
    "undecided": "yellow",
    "none": "dim",
}


def show(findings: Findings, page: Path | None = None, file: IO[str] | None = None) -> None:
    """Print the verdicts.

    Args:
        findings: of the sweep
        page: of its report, whose path is printed; None if there is none
        file: to print to; None for standard output
    """
    show_head(build.head_of(findings), page, file)


def show_head(head: Head, page: Path | None = None, file: IO[str] | None = None) -> None:
    """Print the top of a report; arguments as of ``show``."""
    console = printing.console(file)
    console.print(f"[bold]{escape(head.title)}[/]  {escape(f'{head.metric}, {head.better}')}")
    if head.state:
        console.print(Text(f"{head.state}\n", style="yellow"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for found in head.headline:
        table.add_row(Text(found["label"], style=STYLES[found["kind"]]), Text(found["text"]))
    printing.show(table, file)
    if head.method:
        console.print(Text(f"\n{head.method}\n", style="dim"))
    if page is not None:
        console.print(str(page), soft_wrap=True)
