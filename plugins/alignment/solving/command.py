"""``blockwright evaluate MODEL --task FILE``: how many prompts a model answers right, in one attempt and in k."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from blockwright.blocks.checkpoint.source import DTYPES
from blockwright.blocks.generation.generate import check_lengths
from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.lab.chat.conversation import format_of
from blockwright.lab.writer import Writer
from blockwright.plugins.alignment.solving.measure import Share, Solved, solve
from blockwright.plugins.alignment.solving.problems import read_problems
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.command import Parser, strict_json
from blockwright.registry.folder import write_text
from blockwright.registry.printing import show


def _parser() -> Parser:
    parser = Parser(prog="blockwright evaluate", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a *.ckpt, or the OUT of blockwright import")
    parser.add_argument("--task", required=True, type=Path, metavar="FILE", help="prompts and a reward, in YAML")
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N prompts alone")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="completions decoded together; default 64")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--visits", type=int, metavar="R", help="of a loop's layers; default: those of the model")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--device", help="cpu, cuda:0, …; default: a GPU if there is one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every completion and its reward, as JSON lines")
    parser.add_argument("--json", action="store_true", help="print plain numbers")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line, the model or the task
    """
    words = _parser().parse_args(arguments)
    for option, value in (("--limit", words.limit), ("--rows", words.rows)):
        if value is not None and value < 1:
            raise ConfigError(option, value, "must be at least 1", "Leave it out")
    problems = read_problems(words.task)
    writer = Writer.open(words.model, dtype=words.dtype, device=words.device, visits=words.visits)
    problems.judge()
    prompts, chat = problems.asked(writer.words, words.limit, format_of(Path(words.model), writer.words))
    try:
        check_lengths(writer.decoder, [max((p.ids for p in prompts), key=len)], problems.max_new_tokens)
    except BlockError as error:
        raise ConfigError("task.max_new_tokens", problems.max_new_tokens, error.rule, error.remedy) from None
    keep_freed_memory()
    given = (writer.decoder, writer.words, problems, prompts, chat.ends(writer.words), words.seed, words.rows)
    found = solve(*given, (lambda line: None) if words.json else (lambda line: print(line, flush=True)))
    if words.out is not None:
        words.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(words.out, "".join(json.dumps(each) + "\n" for each in found.completions))
    if words.json:
        print(strict_json({k: v for k, v in asdict(found).items() if k != "completions"}))
    else:
        show(table(found))


def table(found: Solved) -> Table:
    """The figures with their intervals."""
    made = Table(title=f"{found.prompts} prompts", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("figure", "value", "95 % interval"):
        made.add_column(head, justify="left" if head == "figure" else "right")
    rows: list[tuple[str, Share]] = [("likeliest completion right", found.greedy)]
    rows += [(f"pass@{k}", share) for k, share in found.passed.items()]
    for name, share in rows:
        made.add_row(name, f"{share.value:.3f}", f"{share.low:.3f} to {share.high:.3f}")
    made.add_row("mean reward of a sample", f"{found.reward:.3f}", "")
    made.add_row("samples cut off", f"{found.truncated:.3f}", "")
    if found.judged < 1:
        made.add_row("completions with a reward", f"{found.judged:.3f}", "")
    if found.failures:
        made.add_row("failures of rewards", str(found.failures), "")
    return made
