"""``blockwright verdict DIR``: what a sweep decides, for a reader or for a script."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blockwright.lab.report import terminal
from blockwright.lab.report.document import as_json, document
from blockwright.lab.report.request import findings_of, parser
from blockwright.lab.report.verdict import exit_code, verdicts
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command
from blockwright.registry.extras import require

ABOUT = (
    "Print the verdict on each arm of a sweep: better, worse, the same within a margin, undecided (and the seeds that "
    "it needs), or none (and why). It writes nothing. Exit code 0: every arm is better, worse or the same; 3: some are "
    "undecided; 4: on some there is no verdict."
)


def main(arguments: Sequence[str]) -> int:
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
        print(as_json(document(findings)))
    else:
        terminal.show(findings)
    return exit_code(verdicts(findings))


if __name__ == "__main__":
    sys.exit(run_command(main))
