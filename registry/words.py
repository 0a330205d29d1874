"""Sort the ``KEY=VALUE`` words of a command line: the command's own settings, and Hydra overrides."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockwright.registry.command import Parser
from blockwright.registry.errors import ConfigError


@dataclass(frozen=True)
class Words:
    """The words of a command line that are no flags.

    Args:
        settings: the command's own ``KEY=VALUE`` words; ``registry.reading.typed`` converts them
        overrides: all other ``KEY=VALUE`` and ``~KEY`` words, unchanged, for Hydra
        names: all other words
    """

    settings: dict[str, str]
    overrides: list[str]
    names: list[str]


def read_words(
    parser: Parser, arguments: Sequence[str], own: Collection[str], n_names: int = 0
) -> tuple[Namespace, Words]:
    """Parse a command line of flags and words in any order.

    Args:
        parser: knows the flags
        arguments: of the command
        own: keys of the command's own settings; after ``cache.bits``, all that begin with ``cache.`` are its own
        n_names: maximum number of words that are neither ``KEY=VALUE`` nor ``~KEY``

    Raises:
        ConfigError: an unknown flag, or as ``sort_words``
    """
    parser.add_argument("words", nargs="*")
    flags = parser.parse_intermixed_args(arguments)
    return flags, sort_words(flags.words, own, n_names)


def sort_words(words: Sequence[str], own: Collection[str], n_names: int = 0) -> Words:
    """Sort words; arguments as in ``read_words``.

    Raises:
        ConfigError: a setting given twice or without its value, or too many names
    """
    groups = {key.partition(".")[0] for key in own if "." in key}
    settings: dict[str, str] = {}
    overrides, names = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            names.append(word)
        elif key not in own and key.partition(".")[0] not in groups:
            overrides.append(word)
        elif key in settings:
            raise ConfigError(key, value, f"is given twice, {settings[key]} before", "Leave one of them out")
        else:
            settings[key] = value
    for word in names[n_names:]:
        if word in own:
            raise ConfigError("command line", word, "has no value", f"Write {word}=VALUE")
        remedy = f"Name one at a time: {names[0]}, say" if n_names else f"Write model={word} for a model"
        raise ConfigError("command line", word, "is not KEY=VALUE", remedy)
    return Words(settings, overrides, names)


# --- words quoted for Hydra's override grammar ---


def quoted(value: Path | str) -> str:
    """A path quoted for Hydra's override grammar; one with a slash and plain characters is itself."""
    if re.fullmatch(r"[\w./-]*/[\w./-]*", str(value), re.ASCII):
        return str(value)
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), str(value))
    return f"'{escaped}'"
