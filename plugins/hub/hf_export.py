"""``blockwright export RUN DIR [OVERRIDE …]``: write a model for Hugging Face, or for another engine that trains it.

``--to ENGINE`` writes what ``--to hf`` does, a folder that transformers loads, and a configuration of the engine beside
it. KEY=VALUE change the plan and the run's configuration: gpus=N gpu=NAME, and tensor, pipeline, context, expert,
interleave, micro_batch, recompute to hold a size fixed; optimizer=adamw trainer.max_steps=100000
data.batch_size=4096 data.sequence_length=4096. RUN may then also be a preset or the *.yaml of a composition:
config.json is written, and no weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.peft import export_adapter
from blockwright.plugins.hub.sizes import DTYPES, USUAL_BYTES, add_sizes
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command

ENTRY_POINTS = "blockwright.engines"  # name → a function of the parsed arguments, which may call ``export``


def _parser(engines: Sequence[str]) -> Parser:
    parser = Parser(prog="blockwright export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder, a *.ckpt, or an imported folder")
    parser.add_argument("out", metavar="DIR", type=Path, help="must not exist, or be empty")
    parser.add_argument("--family", help="the model_type to write; default: detected")
    parser.add_argument("--adapter", action="store_true", help="a LoRA run's adapter alone, in PEFT's layout")
    add_sizes(parser, (*DTYPES, "original"), "; original: as published")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="of the plan and the training; see above")
    parser.add_argument("--to", choices=("hf", *engines), default="hf", help="who is to read it (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    engines = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    given = _parser(sorted(engines)).parse_intermixed_args(arguments)
    if given.to != "hf":
        if given.adapter:
            rule = "writes an adapter alone, which this engine does not start from"
            remedy = f"Leave it out, and the adapter is merged; or leave out --to {given.to}"
            raise ConfigError("--adapter", True, rule, remedy)
        engines[given.to].load()(given)
        return
    if given.settings:
        rule = "a Hugging Face folder says nothing of how to train"
        to = f", or add --to {min(engines)}" if engines else ""
        raise ConfigError("command line", given.settings[0], rule, f"Leave it out{to}")
    export(given)


def export(given: argparse.Namespace, beside: Mapping[str, str] | None = None) -> None:
    """Export as the arguments of ``add_export`` say, and report it.

    Args:
        beside: name → text of further files

    Raises:
        ConfigError: at ``--dtype``, for an adapter
    """
    if given.adapter:
        if given.dtype is not None:
            raise ConfigError("--dtype", given.dtype, "an adapter is written as it was trained", "Leave it out")
        if given.max_shard_size is not None:
            raise ConfigError("--max-shard-size", given.max_shard_size, "an adapter is one file", "Leave it out")
        written = export_adapter(given.source, given.out, family=given.family)
        print(f"Exported the adapter to {given.out}, for a model of model_type {written!r}.")
        return
    dtype = DTYPES.get(given.dtype, given.dtype)
    options = {"family": given.family, "dtype": dtype, "max_bytes": given.max_shard_size or USUAL_BYTES}
    written, why = export_folder(given.source, given.out, **options, beside=beside)
    print(f"Exported to {given.out} as model_type {written!r}.")
    if why:
        print(f"No family of transformers describes this composition ({why}), so it has our own config and names;")
        print("blockwright import reads it back.")


if __name__ == "__main__":
    sys.exit(main())
