"""Shared behaviour of all command lines: wrong arguments, interruption, broken pipes."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from blockwright.registry import user_conf
from blockwright.registry.errors import REFUSED, ConfigError, did_you_mean, refusal_of_full, refused_path

INTERRUPTED = 130  # 128 + SIGINT


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises ``ConfigError`` and accepts no abbreviated options."""

    def __init__(self, *, prog: str, description: str | None = None) -> None:
        shown = description and description.replace("``", "")  # marks around names of code
        super().__init__(prog=prog, description=shown, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        _, unknown, wrong = message.rpartition("unrecognized arguments: ")
        if not unknown:
            raise ConfigError("command line", " ".join(sys.argv[1:]), message, f"See {self.prog} --help")
        flags = [flag for action in self._actions for flag in action.option_strings]
        remedy = did_you_mean(wrong.split()[0], flags)
        if wrong.split()[0] in ("-m", "--multirun"):
            remedy = "Leave it out: this command already runs all values"
        raise ConfigError("command line", wrong, message, remedy)


def run_command(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        command: takes the arguments, may return an exit code, and raises ``ConfigError`` for wrong arguments
        arguments: None for those of the process; ``--config-dir DIR`` is taken out for all commands

    Returns:
        the exit code; a ``ConfigError`` and a full disk are printed as one message
    """
    try:
        code = command(user_conf.taken(sys.argv[1:] if arguments is None else arguments)) or 0
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        refusal = refusal_of_full(error) or refused_path(error, "Name another path, or correct its permissions")
        if refusal is None:
            raise
        print(refusal.render(), file=sys.stderr)
        return REFUSED


# --- sort the ``KEY=VALUE`` words of a command line: the command's own settings, and Hydra overrides ------------------


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


# --- what ``--json`` prints -------------------------------------------------------------------------------------------


def strict_json(document: Any) -> str:
    """The text of a document. Numbers that are not finite, which JSON does not have, are null."""
    return json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- words quoted for Hydra's override grammar ------------------------------------------------------------------------


def quoted(value: Path | str) -> str:
    """A path quoted for Hydra's override grammar; one with a slash and plain characters is itself."""
    if re.fullmatch(r"[\w./-]*/[\w./-]*", str(value), re.ASCII):
        return str(value)
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), str(value))
    return f"'{escaped}'"
