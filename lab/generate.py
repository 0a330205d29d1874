"""``python -m lab.generate MODEL --prompt TEXT …``: what a model writes. In Python::

    from lab.generate import Writer
    writer = Writer.open("logs/train/runs/RUN")
    print(writer.write("ROMEO:", 200, temperature=0.8)[0])

``MODEL`` is a run's folder, a checkpoint or an imported folder. Left out: chat templates, a server, several devices.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

import registry
from blocks.decoder import Decoder
from blocks.generate import Continuations
from blocks.kernels.machine import keep_freed_memory, set_float32_matmul
from blocks.sample import Sampling
from blocks.text_stream import TextStream
from interop.source import Source, build, open_source
from registry import REFUSED, BlockError, ConfigError, did_you_mean
from training.data.tokenizers.base import Tokenizer
from training.data.tokenizers.pretrained import Pretrained
from training.data.tokenizers.rebuild import rebuild

INTERRUPTED = 130
DTYPES = ("float32", "bfloat16", "float16", "float64")
BITS = (8, 6, 4)


@dataclass(frozen=True)
class Request:
    """What to do with every prompt.

    Args:
        new_tokens: how many to add at most; a document that ends sooner ends the text
        sampling: how they are drawn
        stops: strings that end a text, and are not part of it
        seed: prompt i draws from seed + i, so it gives the same text whatever the others are
        bits: of the caches' numbers, 8, 6 or 4; None for exact ones
        bos: whether every prompt begins with the token that begins a document
    """

    new_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    seed: int = 0
    bits: int | None = None
    bos: bool = False


class Writer:
    """A model, its tokenizer, and what ends a text.

    Args:
        decoder: in evaluation mode
        words: its tokenizer
        bos: the token that begins a document
        ends: tokens that end one
    """

    def __init__(self, decoder: Decoder, words: Tokenizer, bos: int, ends: frozenset[int]) -> None:
        self.decoder, self.words, self.bos, self.ends = decoder, words, bos, ends

    @classmethod
    def open(cls, path: str | Path, *, dtype: str = "float32", device: str | None = None) -> Writer:
        """The model at a place.

        Args:
            path: a run's folder, a *.ckpt, or the OUT of interop.hf import
            dtype: in which to compute
            device: on which; None for a GPU where there is one

        Raises:
            ConfigError: there is no model, no tokenizer, or no such dtype or device
        """
        if dtype not in DTYPES:
            raise ConfigError("dtype", dtype, "is none to compute in", did_you_mean(dtype, DTYPES))
        where = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = Path(path)
        if not folder.exists():
            remedy = "Name a run's folder (logs/train/runs/…), a *.ckpt, or the OUT of interop.hf import"
            raise ConfigError("MODEL", str(path), "there is no such file or folder", remedy)
        registry.load()
        source = open_source(folder)
        words, config = tokenizer_of(source, folder), source.origin.get("config", {})
        decoder = build(source, dtype=getattr(torch, dtype), device=where)
        known, named = decoder.config["vocab_size"], config.get("eos_token_id")
        ends = {words.eos, *(named if isinstance(named, list) else [] if named is None else [named])}
        bos = words.eos if config.get("bos_token_id") is None else config["bos_token_id"]
        return cls(decoder, words, bos, frozenset(end for end in ends if end < known))

    def write(
        self,
        prompts: str | Sequence[str],
        new_tokens: int = 200,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stops: Sequence[str] = (),
        seed: int = 0,
        bits: int | None = None,
    ) -> list[str]:
        """Continuations, without their prompts.

        Args:
            prompts: one, or several, which are computed together
            new_tokens, stops, seed, bits: see ``Request``
            temperature, top_k, top_p, min_p, repetition_penalty: see ``Sampling``

        Raises:
            ConfigError: a prompt is empty, or an option out of its range
        """
        try:
            sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        except BlockError as error:
            raise _at_its_option(error) from None
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [""] * len(given)
        for row, piece in self.stream(given, Request(new_tokens, sampling, tuple(stops), seed, bits)):
            texts[row] += piece
        return texts

    def stream(
        self, prompts: Sequence[str], request: Request, ended: Callable[[int, str, int], None] | None = None
    ) -> Iterator[tuple[int, str]]:
        """Pieces of text as they come, each with the number of its prompt.

        Args:
            ended: told, when a text has ended, its prompt's number, why (``end`` of the document, ``stop`` or
                ``length``), and the tokens it took

        Raises:
            ConfigError: at the first piece, for a prompt or a request that cannot be
        """
        ids = [self.encode(prompt, request.bos) for prompt in prompts]
        texts = [TextStream(self._decode, request.stops) for _ in ids]
        counts, open_rows = [0] * len(ids), set(range(len(ids)))

        def close(row: int, why: str) -> Iterator[tuple[int, str]]:
            open_rows.discard(row)
            if rest := texts[row].close():
                yield row, rest
            if ended:
                ended(row, why, counts[row])

        rows = self._continued(ids, request)
        for tokens in rows:
            for row in sorted(open_rows):
                token = tokens[row]
                if token is None:
                    yield from close(row, "end")
                    continue
                counts[row] += 1
                if piece := texts[row].push(token):
                    yield row, piece
                if texts[row].ended:
                    rows.end(row)
                    yield from close(row, "stop")
        for row in sorted(open_rows):
            yield from close(row, "end" if rows.ended[row] else "length")

    def _continued(self, ids: Sequence[Sequence[int]], request: Request) -> Continuations:
        try:
            return Continuations(
                self.decoder,
                ids,
                request.new_tokens,
                request.sampling,
                seed=request.seed,
                stop_tokens=self.ends,
                bits=request.bits,
            )
        except BlockError as error:
            raise _at_its_option(error) from None
        except NotImplementedError:
            rule = "an attention of this model has no new_cache, and text is generated through a cache"
            raise ConfigError("MODEL", self.decoder.config["attention"], rule, "Give the block a new_cache") from None

    def encode(self, prompt: str, bos: bool = False) -> list[int]:
        """The ids of a prompt.

        Raises:
            ConfigError: there are none, or the model does not know one
        """
        ids = [*([self.bos] if bos else []), *self.words.encode(prompt).tolist()]
        if not ids:
            remedy = "Write some text, or begin a document: --bos"
            raise ConfigError("--prompt", prompt, "is empty, and a model continues at least one token", remedy)
        known = self.decoder.config["vocab_size"]
        if max(ids) >= known:
            rule = f"the tokenizer gives id {max(ids)}, and the model knows {known}: they are not of one model"
            raise ConfigError("--prompt", prompt, rule, "Put the tokenizer.json of the model into its folder")
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self.words.decode(list(ids))


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: torch has none
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ConfigError("device", name, "torch has no such device here", "Write cpu, or cuda:0 on a GPU") from None


def tokenizer_of(source: Source, folder: Path) -> Tokenizer:
    """The tokenizer that a model was trained with, or the tokenizer.json beside it.

    Raises:
        ConfigError: there is none
    """
    if source.tokenizer is not None:
        return rebuild(source.tokenizer)
    if (folder / "tokenizer.json").is_file():
        return Pretrained(str(folder / "tokenizer.json"))
    raise ConfigError("path", str(folder), "has no tokenizer", "Copy the model's tokenizer.json there")


def _at_its_option(error: BlockError) -> ConfigError:
    names = {"new_tokens": "max-new-tokens"}
    option = names.get(error.parameter, error.parameter.replace("_", "-"))
    return ConfigError(f"--{option}", error.value, error.rule, error.remedy)


# --- the command line -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = message.rpartition("unrecognized arguments: ")[2].split()[0]
        near = did_you_mean(unknown, flags) if "unrecognized" in message else "See python -m lab.generate --help"
        raise ConfigError("command line", " ".join(sys.argv[1:]), message, near)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m lab.generate",
        description="What a model writes: streamed to a terminal, as plain text elsewhere.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a *.ckpt, or the OUT of interop.hf import")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; again for several at once")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest; default 0.8")
    parser.add_argument("--top-k", type=int, metavar="K", help="among the K likeliest only")
    parser.add_argument("--top-p", type=float, metavar="P", help="among the fewest whose probabilities add up to P")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="among those at least P times as likely as the likeliest"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; again for several")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; prompt i draws from seed + i")
    parser.add_argument("--bits", type=int, choices=BITS, help="quantise the cache; default: exact")
    parser.add_argument("--bos", action="store_true", help="begin prompts with the token that begins a document")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--device", help="cpu, cuda:0, …; default: a GPU where there is one")
    parser.add_argument("--json", action="store_true", help="print one document when all texts have ended")
    return parser


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, Request]:
    """A command line → what is asked.

    Raises:
        ConfigError: an unknown option, or a value that cannot be
    """
    words = _parser().parse_args(arguments)
    if not words.prompt and not words.bos:
        raise ConfigError("--prompt", None, "says what to continue", 'Write --prompt "…", or --bos for none')
    try:
        sampling = Sampling(words.temperature, words.top_k, words.top_p, words.min_p, words.repetition_penalty)
    except BlockError as error:
        raise _at_its_option(error) from None
    if words.max_new_tokens < 1:
        raise ConfigError("--max-new-tokens", words.max_new_tokens, "counts the tokens to add", "Write 1 or more")
    if not 0 <= words.seed < 2**63:
        raise ConfigError("--seed", words.seed, "is a whole number from 0 to 2^63", "Write e.g. --seed 0")
    stops = tuple(words.stop)
    return words, Request(words.max_new_tokens, sampling, stops, words.seed, words.bits, words.bos)


def main(arguments: Sequence[str]) -> None:
    """Answer a command line.

    Raises:
        ConfigError: whatever is wrong with it or with the model
    """
    words, request = read(arguments)
    prompts = words.prompt or [""]
    set_float32_matmul("auto")
    keep_freed_memory()
    writer = Writer.open(words.model, dtype=words.dtype, device=words.device)
    if words.json:
        print(json.dumps(document(writer, words.model, prompts, request), indent=1, ensure_ascii=False))
    else:
        show(writer, prompts, request)


def document(writer: Writer, model: str, prompts: Sequence[str], request: Request) -> dict[str, Any]:
    """What ``--json`` prints: the request, and for each prompt its ``text``, ``tokens`` and why it ``ended``."""
    found: list[dict[str, Any]] = [{"prompt": prompt, "text": ""} for prompt in prompts]
    for row, piece in writer.stream(prompts, request, lambda i, why, n: found[i].update(tokens=n, ended=why)):
        found[row]["text"] += piece
    sampling = {name: getattr(request.sampling, name) for name in Sampling.__dataclass_fields__}
    return {"model": model, "seed": request.seed, "bits": request.bits, **sampling, "completions": found}


def show(writer: Writer, prompts: Sequence[str], request: Request) -> None:
    """Print prompts and what follows, in their order, a line between two: each piece at once if it is its turn."""
    waiting = list(prompts)
    over: set[int] = set()
    turn = 0

    def put(text: str) -> None:
        print(text, end="", flush=sys.stdout.isatty())

    put(waiting[0])
    for row, piece in writer.stream(prompts, request, lambda i, why, n: over.add(i)):
        waiting[row] += piece
        if row == turn:
            put(piece)
        while turn in over and turn + 1 < len(prompts):
            turn += 1
            put(f"\n---\n{waiting[turn]}")
    for later in waiting[turn + 1 :]:
        put(f"\n---\n{later}")
    put("\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
