"""``blockwright import DIR OUT``: turn a Hugging Face checkpoint into a model of this project."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blockwright.blocks.checkpoint.manifest import check_out, start_from
from blockwright.plugins.hub.gguf import unpack
from blockwright.plugins.hub.importing import import_folder
from blockwright.plugins.hub.sizes import DTYPES, USUAL_BYTES, add_sizes
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command


def _parser() -> Parser:
    parser = Parser(prog="blockwright import", description=__doc__)
    parser.add_argument(
        "source", metavar="DIR", type=Path, help="config.json, *.safetensors, tokenizer files; or a *.gguf"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="must not exist, or be empty")
    parser.add_argument("--mtp", action="store_true", help="import heads of multi-token prediction (DeepSeek-V3)")
    help_ignore = "an unknown key of config.json that changes no logit; again for several; origin.json records it"
    parser.add_argument("--ignore", action="append", default=[], metavar="KEY", help=help_ignore)
    add_sizes(parser, DTYPES)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    given = _parser().parse_args(arguments)
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


if __name__ == "__main__":
    sys.exit(main())
