"""``blockwright report DIR``: write a sweep's results as one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blockwright.lab.report import build, terminal
from blockwright.lab.report.terminal import findings_of, parser
from blockwright.registry.command import run_command


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: there is nothing to report
    """
    of = parser("blockwright report", "Write DIR/report/: what a sweep or an ablation has found.").parse_args(arguments)
    build.need_packages()
    findings = findings_of(of)
    terminal.show(findings, build.write(findings))


if __name__ == "__main__":
    sys.exit(run_command(main))
