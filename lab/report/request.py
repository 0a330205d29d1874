"""The command line of ``blockwright report`` and ``blockwright verdict``: a sweep's folder, and how it is compared."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from blockwright.lab.report.findings import Findings, find
from blockwright.lab.report.reading import read
from blockwright.registry.command import Parser


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
