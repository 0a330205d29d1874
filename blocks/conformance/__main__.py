"""``blockwright check [KIND[/NAME]]``: test that a block keeps the contract of its kind."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from rich.markup import escape
from rich.table import Table

from blockwright.blocks.conformance.cases import CHECKS, Case, Outcome, chosen
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command
from blockwright.registry.printing import console, show

MARKS = {"passed": "[green]✓[/]", "failed": "[bold red]failed[/]", "not applicable": "[dim]–[/]"}
USAGE = """\
blockwright check [KIND[/NAME]]

Build small decoders around a block and test what every block promises: shapes, causality, caches, gradients, precision,
parallel plans and more. Without an argument, all blocks. Wildcards work: 'gating/*'. Exit code 1 if a check fails.
"""


def main(arguments: Sequence[str]) -> int:
    """Check the blocks that match the pattern, by default all; names may have wildcards (``attention/m*``).

    Returns:
        1 if any check failed, else 0

    Raises:
        ConfigError: there is no such kind or block
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    if len(arguments) > 1:
        rule = "takes one pattern of blocks to check"
        raise ConfigError("arguments", " ".join(arguments), rule, "Write e.g. attention, attention/mla or 'gating/*'")
    blocks, out = chosen(arguments[0] if arguments else "*"), console()
    outcomes = {}
    for kind, name in blocks:
        with out.status(f"{kind}/{name}"):
            outcomes[f"{kind}/{name}"] = {check: Case(kind, name, check).outcome() for check in CHECKS}
    if len(blocks) == 1:
        _show_one(*blocks[0], outcomes["/".join(blocks[0])])
    else:
        _show_many(outcomes)
    failed = [
        (block, o.reason) for block, of_block in outcomes.items() for o in of_block.values() if o.status == "failed"
    ]
    causes = len(set(failed))
    of_causes = f", of {causes} cause{'s' * (causes > 1)}" if causes < len(failed) else ""
    out.print(
        f"{len(blocks)} block{'s' * (len(blocks) > 1)}, {len(CHECKS)} checks: {len(failed) or 'none'} failed{of_causes}"
    )
    return 1 if failed else 0


def _show_one(kind: str, name: str, outcomes: dict[str, Outcome]) -> None:
    """A row per check; a cause for which several fail is shown once."""
    table, told = Table("check", "", "promise, or why not", title=f"{kind}/{name}"), dict[str, str]()
    for check, outcome in outcomes.items():
        said = outcome.reason or Case(kind, name, check).promise
        if outcome.status == "failed" and told.setdefault(said, check) != check:
            said = f"as {told[said]!r}"
        table.add_row(check, MARKS[outcome.status], escape(said))
    show(table)


def _show_many(outcomes: dict[str, dict[str, Outcome]]) -> None:
    """A row per block; results other than passed with their reason, given once for checks that share it."""
    table = Table()
    table.add_column("block", no_wrap=True)
    for heading in ("passed", "failed", "not applicable"):
        table.add_column(heading)
    last = None
    for block, of_block in outcomes.items():
        kind = block.partition("/")[0]
        if last not in (None, kind):
            table.add_section()
        last = kind
        others = [_listed(of_block, status) for status in ("failed", "not applicable")]
        passed = sum(o.status == "passed" for o in of_block.values())
        table.add_row(block, f"[green]{passed}[/]", f"[red]{escape(others[0])}[/]", f"[dim]{escape(others[1])}[/]")
    show(table)


def _listed(outcomes: dict[str, Outcome], status: str) -> str:
    reasons: dict[str, list[str]] = {}
    for check, outcome in outcomes.items():
        if outcome.status == status:
            reasons.setdefault(outcome.reason, []).append(check)
    return ";\n".join(f"{', '.join(checks)}: {reason}" for reason, checks in reasons.items())


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads slow down tiny tensors
    sys.exit(run_command(main))
