"""``blockwright draw MODEL [OVERRIDE …] [--out FILE] [--equations]``: draw a model, or a block by its KIND/NAME.

Everything is read off blocks that are built on the meta device; without --out the picture is text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blockwright.lab.drawing.alone import alone, block_picture
from blockwright.lab.drawing.export import refuse_without_extra, save
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.request import Request, request
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.drawing.text import block_text, for_encoding, text
from blockwright.lab.models import composition
from blockwright.registry.command import run_command

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
