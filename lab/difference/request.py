"""The command line of ``blockwright diff``, parsed and validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blockwright.lab.drawing.export import named
from blockwright.lab.models import changes_model
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser
from blockwright.registry.words import read_words

MANY = 1000  # words; those that are too many are refused here


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line.

    Args:
        a, b: names of the models
        overrides: of B
        as_json: whether to print a document
        out: the picture's file
    """

    a: str
    b: str
    overrides: list[str]
    as_json: bool
    out: Path | None


def read(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: not one or two models, nothing to compare, an override of something else, an impossible file
    """
    parser = Parser(prog="blockwright diff")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", metavar="FILE")
    flags, words = read_words(parser, arguments, (), MANY)
    a, b = _models(words.names, words.overrides)
    for key, _, value in (word.partition("=") for word in words.overrides):
        if not changes_model(key):
            remedy = "Write model/KIND=NAME or model.KEY=VALUE; two runs are compared in all their settings"
            raise ConfigError(key, value, "changes no model", remedy)
    return Request(a, b, words.overrides, flags.json, None if flags.out is None else named(flags.out))


def _models(names: Sequence[str], overrides: Sequence[str]) -> tuple[str, str]:
    example = "blockwright diff deepseek_v2 deepseek_v3"
    if not names or not all(names):
        raise ConfigError("A", None, "must name a model", f"Write e.g. {example}")
    if len(names) > 2:
        remedy = f"Leave out {names[2]}, or see the costs of all: blockwright describe model={','.join(names)}"
        rule = f"names {len(names)} models, and two are compared"
        raise ConfigError("command line", " ".join(names)[:200], rule, remedy)
    if len(names) == 1 and not overrides:
        remedy = f"Name another, or what changes: blockwright diff {names[0]} model/attention=gqa"
        raise ConfigError("B", None, "must name a second model, or overrides of the first", remedy)
    return names[0], names[-1]
