"""The report in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from blockwright.lab.report import build, words
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.method import basis
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
    console = printing.console(file)
    better = "more" if findings.sweep.maximize else "less"
    of = ", ".join(filter(None, (findings.sweep.metric, findings.sweep.unit, f"{better} is better")))
    console.print(f"[bold]{escape(findings.sweep.title)}[/]  {escape(of)}")
    if state := words.state(findings):
        console.print(Text(f"{state}\n", style="yellow"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for found in build.headline(findings):
        table.add_row(Text(found["label"], style=STYLES[found["kind"]]), Text(found["text"]))
    printing.show(table, file)
    if text := basis(findings):
        console.print(Text(f"\n{text}\n", style="dim"))
    if page is not None:
        console.print(str(page), soft_wrap=True)
