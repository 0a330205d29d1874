"""``blockwright match OVERRIDE … match=BUDGET by=KNOB``: size the arms of a comparison to the same cost.

Nothing is trained and nothing allocated: everything is measured on the meta device.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict

from blockwright.lab.match import request
from blockwright.lab.match.sizing import read_arm, size
from blockwright.lab.match.table import arms_table
from blockwright.registry.command import run_command, strict_json
from blockwright.registry.printing import show

USAGE = """\
blockwright match [HYDRA OVERRIDE …] match=BUDGET by=KNOB [OPTION=VALUE …] [--json]

Arms are written as for blockwright train -m: model=tiny model/attention=mha,gqa,mqa,mla. Without match they are only
compared.

match      params, active_params, flops or cache_bytes
by         d_ff (dense and shared widths), d_expert, n_experts, d_model, n_layers, or a path: model.ffn.shared.d_ff
tol        how far off an arm may be, as a fraction; default 0.005
baseline   the arm that the others are made equal to, by the value it was swept to; default: the first
target     a number instead of the baseline's, one for all arms or one for each: target=6.9e9,6.9e9,7.1e9
context    tokens of the sequence that FLOPs are counted for; default: data.sequence_length

Of widths the coarsest multiple that is near enough is taken: 64, 32, 16, 8, 4, 2, 1. --json prints plain numbers, with
the overrides that make each arm.
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line or an arm, or an arm that cannot be matched
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    asked = request.read(arguments)
    arms = [read_arm(name, overrides, asked.context) for name, overrides in asked.arms.items()]
    sized = size(arms, asked.baseline, asked.match, asked.targets)
    if asked.as_json:
        plain = [arm.as_plain(arm.arm.name == asked.baseline) for arm in sized]
        print(strict_json({"match": asked.match and asdict(asked.match), "arms": plain}))
        return
    show(arms_table(sized, asked.baseline, sized[0].arm.context))
    for arm in sized:
        print(f"{arm.arm.name}: {shlex.join(arm.overrides)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
