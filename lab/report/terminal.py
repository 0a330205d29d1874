"""``blockwright report DIR``: write the report of a sweep or an ablation, and show its verdicts.

``blockwright verdict DIR [--json]``: show the verdicts alone, with an exit code.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from blockwright.lab.report import build
from blockwright.lab.report.findings import Findings, find
from blockwright.lab.report.page import Head
from blockwright.lab.report.reading import read
from blockwright.lab.report.verdict import document, exit_code, verdicts
from blockwright.registry import ConfigError, printing
from blockwright.registry.command import Parser, strict_json
from blockwright.registry.errors import require

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


# --- the command line of ``blockwright report`` and ``blockwright verdict`` -------------------------------------------


def parser(prog: str, description: str) -> Parser:
    """A parser of the arguments that both commands take."""
    made = Parser(prog=prog, description=description)
    made.add_argument("directory", metavar="DIR", type=Path, help="folder of a sweep: logs/*/multiruns/…")
    made.add_argument("--baseline", metavar="NAME", help="arm that the others are compared with")
    made.add_argument("--metric", metavar="NAME", help="what they are compared by, as in results.json: test/loss")
    made.add_argument("--direction", metavar="WAY", help="minimize or maximize it, if its runs do not say which")
    return made


def findings_of(arguments: Namespace) -> Findings:
    """The findings of the sweep that a command line names.

    Raises:
        ConfigError: there is nothing to report
    """
    return find(read(arguments.directory, arguments.baseline, arguments.metric, arguments.direction))


ABOUT = (
    "Print the verdict on each arm of a sweep: better, worse, the same within a margin, undecided (and the seeds that "
    "it needs), or none (and why). It writes nothing. Exit code 0: every arm is better, worse or the same; 3: some are "
    "undecided; 4: on some there is no verdict."
)


def verdict_command(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0, 3 or 4, as its help says

    Raises:
        ConfigError: there is nothing to compare
    """
    made = parser("blockwright verdict", ABOUT)
    made.add_argument("--json", action="store_true", help="print the document that a report has in verdict.json")
    of = made.parse_args(arguments)
    require("lab", "scipy", path="blockwright.lab.report")
    findings = findings_of(of)
    if findings.sweep.kind == "search":
        rule = "is a search, whose trials depend on each other, so that they are not compared"
        raise ConfigError("DIR", str(of.directory), rule, f"See the best trial: blockwright report {of.directory}")
    if not findings.others:
        remedy = "Sweep over what is to be compared: blockwright train -m model/attention=mha,gqa seed=0,1,2"
        raise ConfigError("DIR", str(of.directory), "has one arm, so that nothing is compared", remedy)
    if of.json:
        print(strict_json(document(findings)))
    else:
        show(findings)
    return exit_code(verdicts(findings))


def report_command(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: there is nothing to report
    """
    of = parser("blockwright report", "Write DIR/report/: what a sweep or an ablation has found.").parse_args(arguments)
    build.need_packages()
    findings = findings_of(of)
    show(findings, build.write(findings))
