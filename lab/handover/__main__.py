"""Export a model: to Hugging Face, or with a run configuration to an engine that trains in pipelines.

`--to megatron-bridge` and `--to automodel` write what `--to hf` does, a folder that transformers loads, and a
configuration beside it. They take what the planner takes: gpus=N gpu=NAME, and tensor, pipeline, context, expert,
interleave, micro_batch, recompute to hold a size fixed. All other KEY=VALUE change the run's configuration:
optimizer=adamw trainer.max_steps=100000 data.batch_size=4096 data.sequence_length=4096. RUN may also be a preset or the
*.yaml of a composition: then config.json is written, and no weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from blockwright.interop.hf import add_export, export
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command

ENGINES = ("megatron-bridge", "automodel")


def _parser() -> Parser:
    parser = Parser(prog="blockwright export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_export(parser)
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="of the plan and the training; see above")
    parser.add_argument("--to", choices=("hf", *ENGINES), default="hf", help="who is to read it (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    given = _parser().parse_intermixed_args(arguments)
    if given.to == "hf":
        if given.settings:
            rule = "a Hugging Face folder says nothing of how to train"
            raise ConfigError("command line", given.settings[0], rule, f"Leave it out, or add --to {ENGINES[0]}")
        export(given)
        return
    if given.adapter:
        rule = "writes an adapter alone, which this engine does not start from"
        raise ConfigError(
            "--adapter", True, rule, f"Leave it out, and the adapter is merged; or leave out --to {given.to}"
        )
    from blockwright.lab.handover.export import hand_over  # the planner, and so DTensor, which --help does without

    hand_over(given)


if __name__ == "__main__":
    sys.exit(main())
