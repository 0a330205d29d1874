"""``blockwright diff A [B] [OVERRIDE …] [--out FILE] [--json]``: two models, or two runs, side by side: what differs.

A and B are compared where their blocks act, layer by layer, on the meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blockwright.lab.difference import text
from blockwright.lab.difference.difference import Side, difference
from blockwright.lab.difference.picture import side_by_side
from blockwright.lab.difference.record import read as read_record
from blockwright.lab.difference.request import read
from blockwright.lab.difference.settings import read as read_settings
from blockwright.lab.drawing.export import refuse_without_extra, save
from blockwright.lab.drawing.letters import clean
from blockwright.lab.models import composition
from blockwright.lab.report.document import as_json
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command

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
        print(as_json(found.to_plain()))
    else:
        text.show(found)
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
