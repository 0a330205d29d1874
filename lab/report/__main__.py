"""``blockwright report DIR``: write a sweep's results as one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from blockwright.lab.report import build, terminal
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.registry.command import Parser, run_command


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: there is nothing to report
    """
    parser = Parser(prog="blockwright report", description="Write DIR/report/: what a sweep or an ablation has found.")
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a sweep: logs/*/multiruns/…")
    parser.add_argument("--baseline", metavar="NAME", help="arm that the others are compared with")
    parser.add_argument("--metric", metavar="NAME", help="what they are compared by, as in results.json: test/loss")
    parser.add_argument("--direction", metavar="WAY", help="minimize or maximize it, if its runs do not say which")
    given = parser.parse_args(arguments)
    build.need_packages()
    findings = find(read(given.directory, given.baseline, given.metric, given.direction))
    terminal.show(findings, build.write(findings))


if __name__ == "__main__":
    sys.exit(run_command(main))
