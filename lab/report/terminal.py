"""The report as a person reads it in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lab.report import build, words
from lab.report.findings import Findings

STYLES = {
    "better": "bold green",
    "worse": "red",
    "baseline": "bold",
    "noise": "dim",
    "unknown": "yellow",
    "unfinished": "yellow",
    "lost": "red",
}


def show(findings: Findings, page: Path, console: Console | None = None) -> None:
    """Verdicts, and where the page lies."""
    console = console or Console()
    console.print(f"[bold]{escape(findings.sweep.name)}[/]  {escape(findings.sweep.metric)}", highlight=False)
    if state := words.state(findings):
        console.print(Padding(Text(state, style="yellow"), (0, 0, 1, 0)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for found in build.verdicts(findings):
        table.add_row(Text(found["label"], style=STYLES[found["tone"]]), Text(found["text"]))
    console.print(table)
    if method := build.method(findings):
        console.print(Padding(Text(method, style="dim"), (1, 0)))
    console.print(str(page), highlight=False, soft_wrap=True)
