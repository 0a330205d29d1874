"""``blockwright plan model=NAME gpus=N gpu=NAME [OVERRIDE …]``: spread a training over GPUs: time, memory, cost."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blockwright.registry.command import run_command

USAGE = """\
blockwright plan model=NAME gpus=N gpu=NAME [OPTION=VALUE …] [HYDRA OVERRIDE …] [--explain] [--json]
blockwright plan model=NAME gpus=N gpu=NAME [weights.bits=16] [cache.bits=16] [length=4096] --generation
blockwright plan --published

model            a preset, a run (logs/…), a checkpoint (*.ckpt) or a composition (*.yaml)
gpus, gpu        how many, and of which kind: a file of plugins/planner/gpus (h100, h800, h200, a100, gb200, …)
tokens           of the whole training: adds GPU-hours, days and energy
batch            sequences of an optimizer step; default 8 a GPU
length           tokens of a sequence; default 4096, or fewer if the model must
precision        bf16 or fp8, of the matrix products; default bf16
price.gpu_hour   what a GPU costs an hour, in any currency: adds money
price.kwh        what energy costs; of gpus × watts × power.overhead (default 1.3: hosts, network, cooling)

tensor, pipeline, context, expert, interleave, micro_batch, shard and recompute are searched over; a value, or several
with commas, holds one fixed: pipeline=1 context=1 shard=true is what this project trains itself.

Prints the five best layouts that differ, and what the others lose by. --explain adds where the best one's step goes,
--json prints one document of plain numbers, --generation how many tokens a second the GPUs generate at most, and
--published how far off the model is on published runs.
"""


def main(arguments: Sequence[str]) -> None:
    """Answer a command line.

    Raises:
        ConfigError: whatever is wrong with it or with the model, or no layout fits
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    from blockwright.plugins.planner.answer import answer  # DTensor, and so the compiler, which --help does without

    answer(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
