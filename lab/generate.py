"""``blockwright generate MODEL --prompt TEXT``: write text with a trained model.

``MODEL`` is a run's folder, a checkpoint or an imported folder. From Python: lab/writer.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from blockwright.blocks.generation.sample import Acceptance, Sampling
from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.timing import multiply_fastest
from blockwright.lab import generation_options
from blockwright.lab.attachment import attached, attachments
from blockwright.lab.generation_options import add_options, checked_sampling
from blockwright.lab.writer import Request, Writer
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command
from blockwright.registry.printing import printable


def _parser() -> Parser:
    parser = Parser(
        prog="blockwright generate",
        description="Generate text: streamed to a terminal, plain text elsewhere.",
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a *.ckpt, or the OUT of blockwright import")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; again for several at once")
    for attachment in attachments().values():
        attachment.add_options(parser)
    generation_options.add_draft_options(parser)
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
    generation_options.check_draft_options(words)
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
        writer.drafts = generation_options.drafter(writer, words.drafts, words.draft_tokens)
    if words.json:
        found = document(writer, words.model, prompts, request)
        print(json.dumps(found, indent=1, ensure_ascii=False))
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
