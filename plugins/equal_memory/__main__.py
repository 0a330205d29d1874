"""``blockwright throughput OVERRIDE … memory=SIZE``: tokens a second of architectures at an equal memory of caches.

Every arm decodes as many sequences at once as its caches fit into the memory, and alternates with the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blockwright.registry.command import run_command

USAGE = """\
blockwright throughput [HYDRA OVERRIDE …] memory=SIZE [OPTION=VALUE …] [--json]

Arms are written as for blockwright match: model=tiny model/attention=mha,gqa,mqa,mla.

memory     bytes that the caches of all sequences may take together: 64MB, 1GiB; weights are counted apart
bits       of a number in the caches: null (exact), 8, 6, 4, or several; default null. The first is compared with
context    tokens in the cache of each sequence: 256,1024,4096; default 1024
baseline   the arm that the others are compared with; default: the first
rows       at most so many sequences; needed by an arm that remembers nothing
repeats    rounds, in each of which every arm has a turn; default 5
steps      tokens of every sequence that a turn times; default 4
dtype      of weights and exact caches; default float32
device     cpu, cuda:0, …; default: a GPU if there is one
threads    of the processor; default 1, so that what else runs changes little

Prints sequences and tokens a second beside the roofline and the plan, and three comparisons apart: architecture at
equal bits, bits alone, both. Writes a report to LOG_DIR/throughput/TIME/report; paths.log_dir=DIR chooses LOG_DIR.
--json prints one document of plain numbers.
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line or an arm, or an arm that does not fit
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    from blockwright.plugins.equal_memory.answer import answer  # torch, which --help does without

    answer(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
