"""``blockwright data [OVERRIDE …]``: what the data of a run is made of, and samples of it, before the run.

Overrides are those of blockwright train. A row for each source, or split of a text: tokens, shares by stage, epochs,
bytes a token, and whether the tokenizer is the one that made it. Of shards only heads and samples are read; a corpus of
text is tokenised into the cache, as the run would do. What the run would refuse is refused after the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command
from blockwright.registry.printing import show

if TYPE_CHECKING:
    from blockwright.training.configuration.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(prog="blockwright data", description=__doc__)
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="as of blockwright train: data=mixture …")
    parser.add_argument("--samples", type=int, default=20, help="decoded stretches, of all sources together (20)")
    given = parser.parse_intermixed_args(arguments)
    from blockwright.training.configuration import placeholders
    from blockwright.training.configuration.composing import compose_config  # Lightning, which --help does without
    from blockwright.training.entry.parse import parse_settings

    _show(parse_settings(compose_config(given.overrides, output_dir=placeholders.ANY)), given.samples)


def _show(run: Run, n_samples: int) -> None:
    from blockwright.training.configuration import parts
    from blockwright.training.configuration.trainer_settings import batches_of
    from blockwright.training.data.modules.batches import DataModule

    if parts.class_of("data", run).overview is DataModule.overview:
        raise ConfigError("data", run.data["name"], "has no table of its sources", "data=mixture has one")
    data = parts.build("data", run)
    data.prepare_data()
    data.setup()
    batches = batches_of(run.trainer)
    rows = data.overview(batches)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    show(table)
    for name, text in data.samples(-(-n_samples // len(rows)))[:n_samples]:
        print(f"{name}: {text!r}")
    data.check_run(batches)


if __name__ == "__main__":
    sys.exit(main())
