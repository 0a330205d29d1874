"""Where the drafts of ``--drafts`` come from."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from blockwright.blocks.generation.drafts import Drafter, Lookup, MultiToken, SmallerModel
from blockwright.lab.writer import Writer, at_its_option
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.command import Parser

TOKENS = 4  # drafted a pass, unless multi-token prediction has its own number


def add_options(parser: Parser) -> None:
    """Add the options of commands that can draft."""
    parser.add_argument(
        "--drafts", metavar="KIND", help="check several tokens a pass: mtp, lookup, or a smaller model's folder"
    )
    parser.add_argument("--draft-tokens", type=int, metavar="N", help="drafted a pass; default: depths of mtp, else 4")


def check_options(words: Namespace) -> None:
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
        "lookup": lambda: Lookup(TOKENS if tokens is None else tokens),
    }
    try:
        return kinds.get(name, lambda: _of_model(writer, name, TOKENS if tokens is None else tokens))()
    except BlockError as error:
        raise at_its_option(error) from None


def _of_model(writer: Writer, path: str, tokens: int) -> Drafter:
    like = writer.decoder.embedding.weight
    small = Writer.open(path, dtype=str(like.dtype).removeprefix("torch."), device=str(like.device), word="--drafts")
    if small.words.fingerprint() != writer.words.fingerprint():
        rule = "has another tokenizer than MODEL, so its drafts are other text"
        raise ConfigError("--drafts", path, rule, "Choose a model that was trained with the same tokenizer")
    return SmallerModel(small.decoder, tokens)
