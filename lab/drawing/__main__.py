"""``blockwright draw MODEL [OVERRIDE …] [--out FILE] [--equations]``: draw a model, or a block by its KIND/NAME.

Everything is read off blocks that are built on the meta device; without --out the picture is text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from blockwright.lab.drawing.export import named, refuse_without_extra, save
from blockwright.lab.drawing.picture import alone, block_picture, picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.drawing.text import block_text, for_encoding, text
from blockwright.lab.models import changes_model, composition
from blockwright.registry import ConfigError, did_you_mean, kinds, names
from blockwright.registry.command import Parser, read_words, run_command
from blockwright.registry.reading import Remedy, keys, read, typed

# --- the command line of ``blockwright draw``, parsed and validated ---------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Settings of a picture.

    Args:
        context: tokens of the sequence that FLOPs are counted for; None: 4096, or fewer if the model must
    """

    context: Annotated[int, Ge(1), Le(10_000_000), Remedy("Write a number of tokens, such as 4096")] | None = None


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line.

    Args:
        name: of a model, or KIND/NAME of a block
        overrides: of the model
        context: as in ``Options``
        equations: whether formulas are drawn
        out: the file; None for the terminal
    """

    name: str
    overrides: list[str]
    context: int | None
    equations: bool
    out: Path | None

    @property
    def title(self) -> str:
        """The name of the model, and what is changed of it."""
        name = Path(self.name).name if "/" in self.name else self.name
        return " ".join([name, *self.overrides])

    @property
    def block(self) -> tuple[str, str] | None:
        """Kind and name, where a registered block is named."""
        kind, slash, name = self.name.partition("/")
        return (kind, name) if slash and kind in kinds() and not Path(self.name).exists() else None


def request(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: no model, an unknown option, an invalid value
    """
    parser = Parser(prog="blockwright draw")
    parser.add_argument("--out", metavar="FILE")
    parser.add_argument("--equations", action="store_true")
    flags, words = read_words(parser, arguments, keys(Options), n_names=1)
    if not words.names:
        name = next((word.partition("=")[2] for word in words.overrides if word.startswith("model=")), "")
        raise ConfigError("command line", None, "must name what to draw", f"Write blockwright draw {name or 'tiny'}")
    found = Request(
        words.names[0],
        words.overrides,
        read(Options, typed(Options, words.settings)).context,
        flags.equations,
        None if flags.out is None else named(flags.out),
    )
    _check_overrides(found)
    _check_block(found)
    return found


def _check_overrides(asked: Request) -> None:
    for key, _, value in (word.partition("=") for word in asked.overrides):
        if key == "model":
            remedy = f"Write blockwright draw {value}"
            raise ConfigError("model", value, f"is a second model beside {asked.name}", remedy)
        if not changes_model(key):
            raise ConfigError(key, value, "is no option and changes no model", did_you_mean(key, ["model", "context"]))
    if asked.equations and asked.out is None:
        raise ConfigError("--equations", True, "are drawn in a file", "Add --out picture.svg")


def _check_block(asked: Request) -> None:
    if asked.block is None:
        return
    kind, name = asked.block
    if name not in names(kind):
        raise ConfigError(kind, name, f"no {kind} is registered under this name", did_you_mean(name, names(kind)))
    if asked.overrides:
        rule = "changes a model, and a block alone is drawn"
        remedy = f"Draw a model with it: blockwright draw tiny model/{kind}={name}"
        raise ConfigError("command line", asked.overrides[0], rule, remedy)


USAGE = """\
blockwright draw MODEL [HYDRA OVERRIDE …] [context=TOKENS] [--out FILE.svg|FILE.pdf|FILE.png] [--equations]
blockwright draw KIND/NAME [--out FILE …] [--equations]

MODEL        a preset, a run (logs/…), a checkpoint (*.ckpt) or a composition (*.yaml)
KIND/NAME    a registered block, such as attention/mla, as it is in a small decoder
OVERRIDE     as blockwright train takes it: model/attention=gqa, model.n_layers=4
context      tokens of the sequence that FLOPs are counted for; default 4096, or fewer if the model must
--out        the file: SVG, or PDF and PNG with the extra draw, 3.3 inches wide; without it, text
--equations  the formulas of the blocks below the picture, from their docstrings
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line or the model, or the file cannot be written
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    asked = request(arguments)
    if asked.out is None:
        print(for_encoding(_text(asked), sys.stdout.encoding), end="")
        return
    refuse_without_extra(asked.out)
    save(_picture(asked), asked.out)


def _text(asked: Request) -> str:
    if asked.block:
        return block_text(alone(*asked.block))
    return text(scheme(composition(asked.name, asked.overrides), asked.title, asked.context))


def _picture(asked: Request) -> str:
    if asked.block:
        return block_picture(alone(*asked.block), asked.equations)
    drawn = scheme(composition(asked.name, asked.overrides), asked.title, asked.context)
    return picture(drawn, equations=asked.equations)


if __name__ == "__main__":
    sys.exit(run_command(main))
