"""``blockwright evaluate MODEL --suite needle --lengths 4k,32k,128k``: how far a trained model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from blockwright import registry
from blockwright.blocks.checkpoint.source import (
    DTYPES,
    Source,
    build,
    checkpoint_of,
    open_source,
    usable_device,
    usable_dtype,
)
from blockwright.blocks.compose import check
from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.timing import multiply_fastest
from blockwright.lab.own_text import own_text, read_text_file
from blockwright.lab.writer import tokenizer_of
from blockwright.plugins.long_context.reading import results
from blockwright.plugins.long_context.reading.base import WORDINGS, find, wording_of
from blockwright.plugins.long_context.reading.measure import DEPTHS, Grid, PositionLoss, position_loss, read
from blockwright.plugins.long_context.reading.report import Reading, written
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, strict_json
from blockwright.registry.folder import own_folder
from blockwright.registry.printing import show
from blockwright.training.starts import check_swaps

SUFFIXES = {"k": 2**10, "m": 2**20}


def _parser() -> Parser:
    parser = Parser(prog="blockwright evaluate", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a *.ckpt, or the OUT of blockwright import")
    parser.add_argument("--suite", required=True, help="reading tests: needle, multi_key, multi_value, …; with commas")
    parser.add_argument("--lengths", required=True, help="tokens of the prompts, with commas: 512,4k,128k")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="of the asked facts, 0 to 1")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="prompts per length and depth; default 32")
    parser.add_argument("--generate", action="store_true", help="generate the answers too")
    parser.add_argument("--wording", default="symbols", help=f"{' or '.join(WORDINGS)}; default symbols")
    parser.add_argument("--symbols", default="128,256", metavar="A,B", help="ids of the symbols, from A up to B − 1")
    parser.add_argument("--position", metavar="NODE", help="a position block to read with: {name: yarn, factor: 8}")
    parser.add_argument("--window", type=int, metavar="N", help="measure the loss by position too, beyond N tokens")
    parser.add_argument("--text", type=Path, metavar="FILE", help="hide facts in this text; default: the run's own")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, …")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for reading.json and the heat maps")
    parser.add_argument("--json", action="store_true", help="print plain numbers")
    return parser


def lengths_of(text: str) -> list[int]:
    """Lengths from text such as ``512,4k,128k``.

    Raises:
        ConfigError: at ``--lengths``
    """
    found = []
    for word in text.split(","):
        digits, suffix = (word[:-1], word[-1:].lower()) if word[-1:].lower() in SUFFIXES else (word, "")
        if not digits.strip().isdecimal() or not int(digits):
            rule = "must list whole numbers of tokens, with commas"
            raise ConfigError("--lengths", word, rule, "Write e.g. --lengths 512,4k,128k")
        found.append(int(digits) * SUFFIXES.get(suffix, 1))
    return found


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(option, text, "must be numbers with commas", f"See {option} in --help") from None


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line, the model or the text
    """
    words = _parser().parse_args(arguments)
    named = [name for name in words.suite.split(",") if name]
    if twice := [name for i, name in enumerate(named) if name in named[:i]]:
        raise ConfigError("--suite", twice[0], "is named twice", "Name each test once")
    tests = find(named, "--suite")
    if words.samples < 1:
        raise ConfigError("--samples", words.samples, "must be at least 1", "Leave it out")
    if words.window is not None and words.window < 1:
        raise ConfigError("--window", words.window, "must be at least 1 token", "Leave it out")
    if words.out and Path(words.out).exists() and not Path(words.out).is_dir():
        raise ConfigError("--out", words.out, "is a file, and a folder is written", "Name a folder")
    dtype = usable_dtype(words.dtype)
    depths = results.check_depths(_numbers("--depths", words.depths, float), "--depths")
    folder = Path(words.model)
    source = _positioned(open_source(folder, "MODEL"), words.position, words.model)
    out = words.out or (own_folder(folder, "reading") if folder.is_dir() and checkpoint_of(folder) else None)
    lengths = results.check_lengths(lengths_of(words.lengths), source.model["max_positions"], "--lengths")
    tokenizer = tokenizer_of(source, folder)
    wording = wording_of(words.wording, _numbers("--symbols", words.symbols, int), tokenizer, lambda key: f"--{key}")
    if words.text:
        text = np.asarray(tokenizer.encode(read_text_file(words.text)), dtype=np.int64)
    else:
        text = own_text(folder, "MODEL").tokens("val")
    grid = Grid(lengths, depths, words.samples, words.seed, words.generate)
    results.try_prompts(tests, grid, text, wording, "--lengths")
    keep_freed_memory()
    device = usable_device(words.device)
    decoder = build(source, dtype=dtype, device=device)
    multiply_fastest(decoder)
    tell = (lambda line: None) if words.json else (lambda line: print(line, flush=True))
    readings = [read(decoder, test, text, wording, grid, tell) for test in tests]
    loss = None if words.window is None else position_loss(decoder, text, max(lengths), words.window)
    if words.json:
        document = {"model": words.model, "tests": [reading.as_plain() for reading in readings]}
        print(strict_json({**document, "loss": None if loss is None else loss.as_plain()}))
    else:
        for reading in readings:
            show(grid_table(reading))
        if loss is not None:
            show(loss_table(loss))
    if out is not None:
        files = results.write(out, readings, loss)
        if not words.json:
            print(f"{out}: {', '.join(file.name for file in files)}")


def _positioned(source: Source, node: str | None, name: str) -> Source:
    """The source with another position block, if one is given."""
    if node is None:
        return source
    position = registry.to_plain(node)
    model = check({**source.model, "position": {"name": position} if isinstance(position, str) else position})
    check_swaps(source.model, model, name, allowed=True)
    return replace(source, model=model)


def grid_table(reading: Reading) -> Table:
    """A row per length, a column per depth."""
    table = Table(title=f"{reading.test}: right tokens of the answers", title_justify="left", box=box.SIMPLE_HEAD)
    heads = [f"{100 * depth:g} %" for depth in reading.depths] or ["all"]
    more = [] if reading.generated is None else ["generated"]
    for head in ("tokens", *heads, "mean", *more):
        table.add_column(head, justify="right")
    for i, (length, row) in enumerate(zip(reading.lengths, reading.teacher_forced, strict=True)):
        told = [] if reading.generated is None else [f"{sum(reading.generated[i]) / len(reading.generated[i]):.3f}"]
        table.add_row(written(length), *(f"{value:.2f}" for value in row), f"{reading.mean(length):.3f}", *told)
    return table


def loss_table(found: PositionLoss) -> Table:
    """A row per bin of positions."""
    error = "" if found.slope_error is None else f" (standard error {found.slope_error:.4f})"
    slope = "too few bins for a slope" if found.slope is None else f"{found.slope:+.4f}{error} nats per doubling"
    title = f"loss by position: {slope} beyond {found.window:,}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("positions", justify="right")
    table.add_column("nats per token", justify="right")
    for first, end, loss in zip(found.edges, found.edges[1:], found.losses, strict=False):
        table.add_row(f"{first:,} to {end - 1:,}", f"{loss:.4f}")
    return table
