"""``blockwright generate MODEL --prompt TEXT``: write text with a trained model.

``MODEL`` is a run's folder, a checkpoint or an imported folder. From Python: lab/writer.py. The options that say how
tokens are drawn, where that is computed and what drafts them are those of other commands too.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from blockwright.blocks.checkpoint.source import DTYPES
from blockwright.blocks.generation.drafts import Drafter, Lookup, MultiToken, SmallerModel
from blockwright.blocks.generation.sample import Acceptance, Sampling
from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.timing import multiply_fastest
from blockwright.lab.attachment import attached, attachments
from blockwright.lab.writer import Request, Writer, at_its_option
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.command import Parser, run_command, strict_json
from blockwright.registry.printing import printable


def add_options(parser: Parser, new_tokens: int, seed: str) -> None:
    """Add how tokens are drawn.

    Args:
        parser: of the command
        new_tokens: the default of ``--max-new-tokens``
        seed: what draws from which seed
    """
    parser.add_argument(
        "--max-new-tokens", type=int, default=new_tokens, metavar="N", help="most tokens to add; default %(default)s"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest; default 0.8")
    parser.add_argument("--top-k", type=int, metavar="K", help="among the K likeliest only")
    parser.add_argument("--top-p", type=float, metavar="P", help="smallest set of tokens whose probability sums to P")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="among those at least P times as likely as the likeliest"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; again for several")
    parser.add_argument("--seed", type=int, default=0, help=f"of the draws, at a temperature above 0; {seed}")
    parser.add_argument("--visits", type=int, metavar="R", help="of a loop's layers; default: those of the model")
    parser.add_argument("--bits", type=int, choices=BITS, help="quantise the cache; default: exact")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--device", help="cpu, cuda:0, …; default: a GPU where there is one")


def checked_sampling(words: Namespace) -> Sampling:
    """How tokens are drawn, once all options are in their ranges.

    Raises:
        ConfigError: at an option that is not, or has no effect
    """
    try:
        sampling = Sampling(words.temperature, words.top_k, words.top_p, words.min_p, words.repetition_penalty)
    except BlockError as error:
        raise at_its_option(error) from None
    if words.max_new_tokens < 1:
        raise ConfigError("--max-new-tokens", words.max_new_tokens, "must be at least 1", "Write 1 or more")
    if "" in words.stop:
        raise ConfigError("--stop", "", "an empty text ends nothing", "Leave it out, or write the text")
    if not 0 <= words.seed < 2**63:
        raise ConfigError("--seed", words.seed, "must be a whole number from 0 to 2^63", "Write e.g. --seed 0")
    # The likeliest token is among any that these keep. A seed has no effect either, and does no harm in a script.
    for name in ("top_k", "top_p", "min_p"):
        if words.temperature == 0 and (given := getattr(words, name)) is not None:
            rule = "has no effect at temperature 0, which takes the likeliest token"
            raise ConfigError(f"--{name.replace('_', '-')}", given, rule, "Leave it out, or raise --temperature")
    return sampling


DRAFTED = 4  # drafted a pass, unless multi-token prediction has its own number


def add_draft_options(parser: Parser) -> None:
    """Add the options of commands that can draft."""
    parser.add_argument(
        "--drafts", metavar="KIND", help="check several tokens a pass: mtp, lookup, or a smaller model's folder"
    )
    parser.add_argument("--draft-tokens", type=int, metavar="N", help="drafted a pass; default: depths of mtp, else 4")


def check_draft_options(words: Namespace) -> None:
    """Refuse a number of drafts where there are none.

    Raises:
        ConfigError
    """
    if words.draft_tokens is not None and words.drafts is None:
        raise ConfigError("--draft-tokens", words.draft_tokens, "has no effect without --drafts", "Add --drafts mtp")


def drafter(writer: Writer, name: str, tokens: int | None = None) -> Drafter:
    """The drafts of a name: ``mtp``, ``lookup``, or the path of a smaller model.

    Args:
        writer: the model that checks them
        tokens: drafted a pass; None for the depths of multi-token prediction, else 4

    Raises:
        ConfigError: the model has no multi-token prediction or fewer depths, or the smaller model another tokenizer
    """
    kinds: dict[str, Callable[[], Drafter]] = {
        "mtp": lambda: MultiToken(writer.decoder, tokens),
        "lookup": lambda: Lookup(DRAFTED if tokens is None else tokens),
    }
    try:
        return kinds.get(name, lambda: _of_model(writer, name, DRAFTED if tokens is None else tokens))()
    except BlockError as error:
        raise at_its_option(error) from None


def _of_model(writer: Writer, path: str, tokens: int) -> Drafter:
    like = writer.decoder.embedding.weight
    small = Writer.open(path, dtype=str(like.dtype).removeprefix("torch."), device=str(like.device), word="--drafts")
    if small.words.fingerprint() != writer.words.fingerprint():
        rule = "has another tokenizer than MODEL, so its drafts are other text"
        raise ConfigError("--drafts", path, rule, "Choose a model that was trained with the same tokenizer")
    return SmallerModel(small.decoder, tokens)


def _parser() -> Parser:
    parser = Parser(
        prog="blockwright generate",
        description="Generate text: streamed to a terminal, plain text elsewhere.",
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a *.ckpt, or the OUT of blockwright import")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; again for several at once")
    for attachment in attachments().values():
        attachment.add_options(parser)
    add_draft_options(parser)
    parser.add_argument("--bos", action="store_true", help="begin prompts with the token that begins a document")
    add_options(parser, 200, "prompt i draws from seed + i")
    parser.add_argument("--json", action="store_true", help="print one document when all texts have ended")
    return parser


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, Request]:
    """Parse a command line.

    Raises:
        ConfigError: an unknown option, or an invalid value
    """
    words = _parser().parse_args(arguments)
    if not words.prompt and not words.bos:
        raise ConfigError("--prompt", None, "is required", 'Write --prompt "…", or --bos for none')
    sampling = checked_sampling(words)
    check_draft_options(words)
    files = attached(words)
    return words, Request(words.max_new_tokens, sampling, tuple(words.stop), words.seed, words.bits, words.bos, files)


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line or the model
    """
    words, request = read(arguments)
    prompts = words.prompt or [""]
    keep_freed_memory()
    writer = Writer.open(words.model, dtype=words.dtype, device=words.device, visits=words.visits)
    multiply_fastest(writer.decoder)
    print(f"weights: {writer.decoder.read_from}", file=sys.stderr)
    if words.drafts is not None:
        writer.drafts = drafter(writer, words.drafts, words.draft_tokens)
    if words.json:
        found = document(writer, words.model, prompts, request)
        print(strict_json(found))
        first = found["completions"][0]["text"]
    else:
        first = show(writer, prompts, request)[0].removeprefix(prompts[0])
        if writer.drafts is not None:
            of, passes = writer.acceptance.share, writer.acceptance.tokens_a_pass
            print(f"drafts: {of:.1%} accepted, {passes:.2f} tokens a pass", file=sys.stderr)
    if request.attached is not None:
        request.attached.finish(first)


def document(writer: Writer, model: str, prompts: Sequence[str], request: Request) -> dict[str, Any]:
    """The ``--json`` document: the request, what became of drafts, and for each prompt its ``text``, ``tokens`` and why
    it ``ended``."""
    found: list[dict[str, Any]] = [{"prompt": prompt, "text": ""} for prompt in prompts]
    for row, piece in writer.stream(prompts, request, lambda i, why, n: found[i].update(tokens=n, ended=why)):
        found[row]["text"] += piece
    drafts = {} if writer.drafts is None else {"drafts": drafts_of(writer.acceptance)}
    sampling = {name: getattr(request.sampling, name) for name in Sampling.__dataclass_fields__}
    weights = writer.decoder.read_from
    return {
        "model": model,
        "weights": weights,
        "seed": request.seed,
        "bits": request.bits,
        **sampling,
        **drafts,
        "completions": found,
    }


def drafts_of(acceptance: Acceptance) -> dict[str, float]:
    """The counts of a generation with drafts, and its figures: the share accepted, and tokens a pass."""
    figures = {"accepted_share": acceptance.share, "tokens_a_pass": acceptance.tokens_a_pass}
    return {"passes": acceptance.passes, "drafted": acceptance.drafted, "accepted": acceptance.accepted, **figures}


def show(writer: Writer, prompts: Sequence[str], request: Request) -> list[str]:
    """Print and return prompts and continuations, in order and separated by a line, streaming the current one."""
    waiting = list(prompts)
    over: set[int] = set()
    turn = 0

    def put(text: str) -> None:
        shown = printable(text) if sys.stdout.isatty() else text
        print(shown, end="", flush=sys.stdout.isatty())

    pieces = writer.stream(prompts, request, lambda i, why, n: over.add(i))  # refuses before anything is printed
    put(waiting[0])
    for row, piece in pieces:
        waiting[row] += piece
        if row == turn:
            put(piece)
        while turn in over and turn + 1 < len(prompts):
            turn += 1
            put(f"\n---\n{waiting[turn]}")
    for later in waiting[turn + 1 :]:
        put(f"\n---\n{later}")
    put("\n")
    return waiting


if __name__ == "__main__":
    sys.exit(run_command(main))
