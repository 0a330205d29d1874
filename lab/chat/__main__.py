"""``blockwright chat MODEL [--system TEXT] [--format NAME]``: talk with a model in its chat format.

On a terminal, lines are messages and answers are streamed; ``/help`` lists the commands. Without one, each line of
standard input is a message, and standard output has the answers alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.timing import multiply_fastest
from blockwright.lab.chat.conversation import USUAL_ROOM, ChatText, Conversation, Manner, difference, own_format
from blockwright.lab.chat.talk import MAX_LINE, Talk
from blockwright.lab.generate import add_options, checked_sampling
from blockwright.lab.writer import Writer
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command
from blockwright.training.data.chat.jinja import has_template
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

PROMPT = "> "
LEAST_ROOM = 16


def _parser() -> Parser:
    parser = Parser(prog="blockwright chat", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a *.ckpt, or the OUT of blockwright import")
    parser.add_argument(
        "--system", metavar="TEXT", help="the system message; default: that of the format, if it has one"
    )
    parser.add_argument(
        "--format", metavar="NAME", help="a chat format: blockwright blocks chat; default: the model's own"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of a conversation; default: the model's positions, at most {USUAL_ROOM}",
    )
    add_options(parser, 1024, "the answer of number n draws from seed + n")
    return parser


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, Manner]:
    """Parse a command line.

    Raises:
        ConfigError: an unknown option, or an invalid value
    """
    words = _parser().parse_args(arguments)
    sampling = checked_sampling(words)
    if words.context is not None and words.context < LEAST_ROOM:
        raise ConfigError("--context", words.context, f"must be at least {LEAST_ROOM}", "Leave it out")
    stops = tuple(words.stop)
    return words, Manner(words.max_new_tokens, sampling, stops, words.seed, words.context, words.bits)


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line or the model; of lines that are piped in, also one in a line
    """
    words, manner = read(arguments)
    keep_freed_memory()
    writer = Writer.open(words.model, dtype=words.dtype, device=words.device, visits=words.visits)
    multiply_fastest(writer.decoder)
    chat = chat_of(Path(words.model), writer.words, words.format)
    conversation = Conversation(writer, chat, manner, words.system)
    _note(f"weights: {writer.decoder.read_from}")
    talk = Talk(conversation, sys.stdout, sys.stderr, sys.stdout.isatty())
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a message that is not UTF-8 is refused, with its text
    if sys.stdin.isatty():
        _note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        _by_hand(talk)
    else:
        _piped(talk)


def chat_of(model: Path, words: Tokenizer, name: str | None) -> ChatText:
    """The chat format to talk in, with a note where other programs would use another.

    Args:
        model: a run's folder, a checkpoint or an imported folder
        words: its tokenizer
        name: a registered format; None for the model's own

    Raises:
        ConfigError: the model has no format, or its tokenizer lacks special tokens of it
    """
    chosen = name or own_format(model, words)
    if chosen is None:
        rule = "has no chat format: no training on conversations, and no chat template beside its tokenizer"
        remedy = "Name the format it knows: --format chatml; fine-tune it on conversations; or continue texts: generate"
        raise ConfigError("MODEL", str(model), rule, remedy)
    chat = ChatText(chosen, words, "--format")
    if chosen != "jinja" and has_template(words) and (unlike := difference(chat, words)):
        _note(f"the chat template that this model is exported with differs from the format in use: {unlike}")
    return chat


def _by_hand(talk: Talk) -> None:
    import readline  # noqa: F401 # input() then edits lines and has a history

    while True:
        try:
            line = input(PROMPT if sys.stdout.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("")
            raise
        try:
            if not talk.take(line):
                return
        except ConfigError as error:
            _note(error.render())
        except KeyboardInterrupt:
            _note("stopped; /retry answers again")


def _piped(talk: Talk) -> None:
    while line := sys.stdin.readline(MAX_LINE + 2):
        if not talk.take(line):
            return


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
