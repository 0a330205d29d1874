"""Options of the commands that write weights: their type, and the size of a file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

import torch

USUAL_BYTES = 5 * 10**9  # of a file of weights
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_sizes(parser: argparse.ArgumentParser, dtypes: Iterable[str], more: str = "") -> None:
    """Add ``--dtype`` and ``--max-shard-size``.

    Args:
        dtypes: the types to choose from
        more: of the help of ``--dtype``
    """
    parser.add_argument("--dtype", choices=tuple(dtypes), help=f"of the parameters; as stored if left out{more}")
    parser.add_argument("--max-shard-size", type=_size, metavar="SIZE", help="e.g. 200MB; default 5GB")


def _size(text: str) -> int:
    """``5GB``, ``200MB``, ``1000B`` → bytes. A number alone is refused: 5 would mean a file for every tensor."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB or 200MB")
    return int(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")
