"""``blockwright cache-loss RUN [--text FILE …]``: what a quantised cache costs in loss, on a run's own text.

Every window goes through the caches in chunks, as in decoding: each token is predicted from what the caches return for
the tokens before it. So the figures hold for text generated with these bits. Left out: windows with the end of a
document, and the effect over thousands of generated tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.lab.own_text import own_text, read_text_file
from blockwright.lab.writer import Writer
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.command import Parser, run_command, strict_json
from blockwright.registry.printing import show

Window = tuple[Tensor, Tensor]  # tokens [B,T], and their next tokens
USUAL = 256  # tokens of a window
CHUNK = 32  # tokens per pass; does not affect the result


@torch.inference_mode()
def mean_loss(decoder: Decoder, windows: Iterable[Window], bits: int | None) -> float:
    """Nats per token over all windows, every token predicted through caches with so many bits per number.

    Args:
        decoder: in evaluation mode
        windows: of equal or different lengths; targets of −100 are not scored
        bits: 8, 6 or 4; None for exact caches
    """
    nats, scored = 0.0, 0
    for tokens, targets in windows:
        caches = decoder.new_caches(tokens.shape[0], tokens.shape[1], bits)
        for part, after in zip(tokens.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
            nats += float(decoder.nll(decoder.hidden(part, caches=caches)[0], after))
            scored += int((after != IGNORED).sum())
    return nats / max(scored, 1)


def losses(decoder: Decoder, windows: Sequence[Window], bits: Sequence[int]) -> list[dict[str, Any]]:
    """One row for exact caches and one for each of ``bits``.

    Returns:
        ``bits`` (None: exact), ``bytes_per_token`` of the caches with their scales, ``loss`` in nats, ``perplexity``,
        ``change`` of the perplexity relative to exact caches, as a fraction
    """
    rows: list[dict[str, Any]] = []
    for b in (None, *bits):
        loss = mean_loss(decoder, windows, b)
        one, two = (sum(cache.nbytes for cache in decoder.new_caches(1, n, b)) for n in (1, 2))
        change = math.exp(loss - rows[0]["loss"]) - 1 if rows else 0.0
        rows.append(
            {"bits": b, "bytes_per_token": two - one, "loss": loss, "perplexity": math.exp(loss), "change": change}
        )
    return rows


# --- the windows ------------------------------------------------------------------------------------------------------


def validation_windows(run: Path, most: int | None) -> Iterator[Window]:
    """Windows of a run's validation text that contain one document.

    Args:
        run: its folder
        most: maximum number of windows evaluated, evenly spaced; None for all

    Raises:
        ConfigError: as in ``own_text``
    """
    batches: Iterable[Any] = own_text(run, "MODEL", most).val_dataloader()
    for batch in batches:
        tokens, targets, segments = batch["tokens"], batch["targets"], batch.get("segments")
        if segments is not None:
            whole = (segments == segments[:, :1]).all(1)
            tokens, targets = tokens[whole], targets[whole]
        if len(tokens):
            yield tokens, targets


def text_windows(writer: Writer, files: Sequence[Path], length: int | None, most: int | None) -> Iterator[Window]:
    """Windows of ``length`` tokens of the files' texts, by default ``USUAL`` or as many as the model reads; at most
    ``most``, evenly spaced over all files.

    Raises:
        ConfigError: a file cannot be read, all are shorter than a window, or a window is longer than the model reads
    """
    room = writer.decoder.config["max_positions"]
    length = min(USUAL, room) if length is None else length
    if length > room:
        raise ConfigError("--length", length, f"the model has positions for {room} tokens", f"Write --length {room}")
    texts = [_ids(writer, file) for file in files]
    starts = [(ids, start) for ids in texts for start in range(0, len(ids) - length, length)]
    if not starts:
        raise ConfigError("--text", [str(file) for file in files], f"no text has {length + 1} tokens", "Lower --length")
    wanted = min(most or len(starts), len(starts))
    for ids, start in (starts[i * len(starts) // wanted] for i in range(wanted)):
        window = torch.tensor([ids[start : start + length + 1]], dtype=torch.int64)
        yield window[:, :-1], window[:, 1:]


def _ids(writer: Writer, file: Path) -> list[int]:
    text = read_text_file(file)
    try:
        return writer.encode(text, option="--text")
    except ConfigError as error:  # whose value is the text
        raise ConfigError(error.path, str(file), error.rule, error.remedy) from None


# --- the command line -------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(prog="blockwright cache-loss", description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a run's folder; with --text also a *.ckpt or an imported folder"
    )
    parser.add_argument(
        "--text", action="append", type=Path, default=[], metavar="FILE", help="instead of the run's own"
    )
    usual = f"tokens of a window of --text; default {USUAL}, or all that the model reads if fewer"
    parser.add_argument("--length", type=int, metavar="N", help=usual)
    parser.add_argument(
        "--windows", type=int, default=128, metavar="N", help="at most so many, evenly spaced; 0 for all; default 128"
    )
    parser.add_argument(
        "--bits", type=int, action="append", choices=BITS, help="again for several; default: 8, 6 and 4"
    )
    parser.add_argument("--json", action="store_true", help="print plain numbers")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line, the model or the text
    """
    words = _parser().parse_args(arguments)
    for name, least in (("length", 1), ("windows", 0)):
        if (given := getattr(words, name)) is not None and given < least:
            raise ConfigError(f"--{name}", given, f"must be at least {least}", "Leave it out")
    if words.length is not None and not words.text:
        rule = "cuts the files of --text, and the text of a run has windows of its own"
        raise ConfigError("--length", words.length, rule, "Add --text FILE")
    writer, most = Writer.open(words.model, device="cpu"), words.windows or None
    names = [writer.cached(bits) for bits in (None, *(words.bits or BITS))]
    if words.text:
        windows = list(text_windows(writer, words.text, words.length, most))
    else:
        windows = list(validation_windows(Path(words.model), most))
    if not windows:
        raise ConfigError("MODEL", words.model, "has no validation text of whole windows", "Name some: --text FILE")
    try:
        rows = losses(writer.decoder, windows, words.bits or BITS)
    except BlockError as error:
        raise ConfigError(f"--{error.parameter}", error.value, error.rule, error.remedy) from None
    scored = sum(int((targets != IGNORED).sum()) for _, targets in windows)
    if words.json:
        print(strict_json({"model": words.model, "tokens": scored, "caches": rows}))
    else:
        show(table(rows, scored, names))


def table(rows: Sequence[dict[str, Any]], scored: int, names: Sequence[str]) -> Table:
    """The rows as a table; ``names`` say how the caches of each hold numbers."""
    shown = Table(box=box.SIMPLE_HEAD, caption=f"{scored:,} tokens scored", caption_justify="left")
    for head in ("cache", "bytes per token", "nats per token", "perplexity", "against exact"):
        shown.add_column(head, justify="left" if head == "cache" else "right")
    for row, name in zip(rows, names, strict=True):
        figures = (f"{row['bytes_per_token']:,}", f"{row['loss']:.5f}", f"{row['perplexity']:.4f}")
        shown.add_row(name, *figures, f"{100 * row['change']:+.3f} %")
    return shown


if __name__ == "__main__":
    sys.exit(run_command(main))
