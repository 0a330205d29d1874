"""Options of commands that generate text: how tokens are drawn, where that is computed, and what drafts them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from blockwright.blocks.checkpoint.source import DTYPES
from blockwright.blocks.generation.drafts import Drafter, Lookup, MultiToken, SmallerModel
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.lab.writer import Writer, at_its_option
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.command import Parser


def add_options(parser: Parser, new_tokens: int, seed: str) -> None:
    """Add them.

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
