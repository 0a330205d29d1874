"""``blockwright diff A [B] [OVERRIDE …] [--out FILE] [--json]``: two models, or two runs, side by side: what differs.

A and B are compared where their blocks act, layer by layer, on the meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blockwright.lab.difference.difference import Side, difference
from blockwright.lab.difference.difference import read as read_record
from blockwright.lab.difference.settings import read as read_settings
from blockwright.lab.difference.views import show, side_by_side
from blockwright.lab.drawing.export import named, refuse_without_extra, save
from blockwright.lab.drawing.sheet import clean
from blockwright.lab.models import changes_model, composition
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, read_words, run_command, strict_json

# --- the command line of ``blockwright diff``, parsed and validated ---------------------------------------------------


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


BOTH_COLUMNS = 504.0  # points: 7 inches, the width of a paper's page
USAGE = """\
blockwright diff A [B] [OVERRIDE …] [--out FILE.svg] [--json]

A, B        presets, runs (logs/…), checkpoints (*.ckpt) or compositions (*.yaml)
OVERRIDE    changes B, as blockwright train takes it: model/attention=gqa, model.n_layers=4. Without B, it changes A
--out FILE  draws both models next to each other, as *.svg, or with the extra draw *.pdf or *.png, 7 inches wide
--json      prints one document of plain numbers, with all settings, the same ones too

Printed are the costs that blockwright describe counts, the blocks of both, and every setting that differs, with its
default if it is not written. Layers that are alike are one group, next to the most similar group of the other model. Of
two runs the other settings, the data, the software and the figures follow.
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line, a model or a run
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    request = read(arguments)
    if request.out:
        refuse_without_extra(request.out)
    found = difference(_side("A", request.a, []), _side("B", request.b, request.overrides))
    if request.as_json:
        print(strict_json(found.to_plain()))
    else:
        show(found)
    if request.out:
        save(side_by_side(found), request.out, BOTH_COLUMNS)


def _side(letter: str, name: str, overrides: list[str]) -> Side:
    try:
        model = read_settings(composition(name, overrides))
        return Side(clean(" ".join([name, *overrides])), model, None if overrides else read_record(name))
    except ConfigError as error:
        raise ConfigError(f"{letter}: {error.path}", error.value, error.rule, error.remedy) from None


if __name__ == "__main__":
    sys.exit(run_command(main))
