"""Convert Hugging Face checkpoints: ``blockwright import DIR OUT``, ``blockwright export RUN DIR``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from blockwright.interop.exporting import export_folder
from blockwright.interop.folder import check_out, start_from
from blockwright.interop.gguf import unpack
from blockwright.interop.importing import import_folder
from blockwright.interop.peft import export_adapter
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command

USUAL_BYTES = 5 * 10**9  # of a file of weights
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _size(text: str) -> int:
    """``5GB``, ``200MB``, ``1000B`` → bytes. A number alone is refused: 5 would mean a file for every tensor."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB or 200MB")
    return int(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")


def _parser() -> Parser:
    parser = Parser(prog="blockwright", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="Hugging Face folder → Blockwright folder")
    into.add_argument(
        "source", metavar="DIR", type=Path, help="config.json, *.safetensors, tokenizer files; or a *.gguf"
    )
    into.add_argument("out", metavar="OUT", type=Path, help="must not exist, or be empty")
    into.add_argument("--mtp", action="store_true", help="import heads of multi-token prediction (DeepSeek-V3)")
    help_ignore = "an unknown key of config.json that changes no logit; again for several; origin.json records it"
    into.add_argument("--ignore", action="append", default=[], metavar="KEY", help=help_ignore)
    _add_sizes(into, DTYPES, "")
    out = commands.add_parser("export", help="Blockwright model → a folder that transformers and vLLM load")
    add_export(out)
    return parser


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an export."""
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder, a *.ckpt, or an imported folder")
    parser.add_argument("out", metavar="DIR", type=Path, help="must not exist, or be empty")
    parser.add_argument("--family", help="the model_type to write; default: detected")
    parser.add_argument("--adapter", action="store_true", help="a LoRA run's adapter alone, in PEFT's layout")
    _add_sizes(parser, (*DTYPES, "original"), "; original: as published")


def _add_sizes(parser: argparse.ArgumentParser, dtypes: Iterable[str], more: str) -> None:
    parser.add_argument("--dtype", choices=tuple(dtypes), help=f"of the parameters; as stored if left out{more}")
    parser.add_argument("--max-shard-size", type=_size, metavar="SIZE", help="e.g. 200MB; default 5GB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    given = _parser().parse_args(arguments)
    if given.command == "import":
        options = {
            "dtype": DTYPES.get(given.dtype),
            "mtp": given.mtp,
            "max_bytes": given.max_shard_size or USUAL_BYTES,
            "ignored": given.ignore,
        }
        found = _import(given.source, given.out, options)
        print(f"Imported {given.source} (model_type {found}) into {given.out}.")
        for key in given.ignore:
            print(f"Ignored {key} of config.json: if it changes the computation, the import is wrong.")
        print(f"Fine-tune it: {shlex.join(['blockwright', 'train', *start_from(given.out)])}")
        return
    export(given)


def _import(source: Path, out: Path, options: dict[str, Any]) -> str:
    if not source.exists():
        remedy = "Nothing is downloaded: fetch it first, e.g. hf download ORG/NAME --local-dir DIR"
        raise ConfigError("DIR", str(source), "there is no such file or folder", remedy)
    if source.suffix != ".gguf" and not source.is_dir():
        raise ConfigError("DIR", str(source), "is one file, and no *.gguf", "Name its folder, with config.json")
    check_out(out)
    print(f"Reading {source}", flush=True)
    if source.suffix != ".gguf":
        return import_folder(source, out, **options)
    beside = next(parent for parent in out.absolute().parents if parent.is_dir())
    with TemporaryDirectory(prefix=f".{out.name}.", dir=beside) as folder:
        unpack(source, Path(folder))
        return import_folder(Path(folder), out, **options)


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
