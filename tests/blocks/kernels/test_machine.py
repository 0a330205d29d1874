"""Memory that a process frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

KEEP = """
import resource, torch
from blockwright.blocks.kernels.machine import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): torch.ones(16 << 20)
before = faults()
for _ in range(10): torch.ones(16 << 20)
print(kept, faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_kept_for_the_next_allocation() -> None:
    counts = {}
    for keep in (True, False):
        output = subprocess.run([sys.executable, "-c", KEEP.format(keep=keep)], capture_output=True, text=True).stdout
        kept, faults = output.split()
        counts[keep] = int(faults)
        assert kept == ("True" if keep else "None")
    assert counts[True] < counts[False] / 5
