"""The page benchmarks/results/absent_gpu.md, and every answer in the JSON beside it: taken in one by one, so that they
can be made in parts."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.absent_gpu.device import GPUS

COLUMNS = {gpu: f"{gpu}, {GPUS[gpu].name.split()[1].split('-')[0]}" for gpu in GPUS}
SECTIONS = {  # check → heading, and what its cells say
    "block": ("Steps of blocks", "Forward, loss and backward of one layer that holds the block: operators called."),
    "preset": ("Steps of presets", "The same of each kind of layer of a preset, at its own widths: operators called."),
    "launches": (
        "Compiled steps of presets",
        "The same with each layer compiled: a kernel counts as one operator. Presets with tables of memories are left "
        "out: to trace a sparse gradient, the compiler asks the device for memory.",
    ),
    "decode": ("One token of presets", "With caches after a prompt, in bf16, of each kind of layer: operators called."),
    "attending": (
        "Attention of presets",
        "Which kernel computes it in bf16, by kind of pass, where `task.kernels.attention` does: torch's `flash`, "
        "`efficient` or `cudnn`, or `flex`. torch's MATH, which holds all scores, is a fault.",
    ),
    "graphs": (
        "Graphs of presets",
        "All layers compiled as `trainer.compile=true` does, without a break: graphs of the forward pass.",
    ),
    "compiled": (
        "Compiled blocks",
        "That layer compiled without a graph break, forward and backward: kernels · most shared memory · most spilled. "
        "Memories by token are left out: the compiler asks the device for memory to trace a sparse gradient. "
        "Rows of before 2026-12-02 also hold kernels of all scores, where a GPU runs a fused attention.",
    ),
    "compiled_preset": ("Compiled presets", "Each kind of layer of a preset compiled: the same figures."),
    "attention": ("FlexAttention", "Its kernels, forward and backward, by what forms the scores: the same figures."),
    "coded": (
        "Attention to codes",
        "`coded_attention`, Triton: its products by the bits of a cache and the rows of a head: the same figures.",
    ),
    "timed": ("Parts that are timed", "What `python -m tests.gpu` times on a GPU, traced without one."),
}
AT_A_GLANCE = {  # column → the check that answers it
    "attention in training": "attending",
    "operators of a step": "preset",
    "of a compiled step": "launches",
    "of a token": "decode",
    "graphs": "graphs",
}
GLANCE = "Where the three cards differ: A100 / H100 / B200."
UNTRIED, NONE, FAILS = "–", "none", "FAILS: "
ABOUT = """# Compiled for GPUs, on a machine without one

**Nothing on this page ran on a GPU.** Training steps were traced on tensors whose device is a GPU and that have no
memory. The compiler wrote kernels for these steps, and `ptxas` made them into machine code. No number was computed and
no time measured.

A row that passes shows that:

* every operator accepts the tensors, and every parameter gets a gradient
* the host never waits to read a number from the GPU, in a step of training or of decoding
* a layer compiles without a break in its graph
* the shared memory of each kernel is within the limit of a block of threads: {limits}

A row says nothing about results, speed, what torch's own fused attention and grouped products compute, or several GPUs.

Operators are those of one layer of each kind with embedding, head and loss, without views, not compiled: each is a
launch or more, of 5 to 10 µs, which is what a step of a small model takes at least.

Kernels are built in the first shape that autotuning would try; a sum that loads rows ahead and does not fit is built
without, as Inductor does. Shared memory is in bytes, of the kernel with most.
Spills are loads and stores of registers in the code, also of the kernel with most: they make a kernel slow, not wrong.

"""


def stamp() -> str:
    """The line that says when and with what the page was made."""
    versions = f"torch {version('torch')} and Triton {version('triton')}"
    return f"Written by `python -m tests.absent_gpu --write`, {versions}; last on {datetime.date.today()}."


def cell(found: Mapping[str, Any]) -> str:
    """A case's answer in a few characters."""
    if found["fault"]:
        return FAILS + re.sub(r"[|\s]+", " ", found["fault"])[:200]
    if "named" in found:
        return found["named"] or NONE
    figures = [f"{found[key]:,}" for key in ("operations", "kernels", "shared", "spilled") if key in found]
    return " · ".join(figures) or "passes"


class Page:
    """The page at a path, and the answers in the JSON beside it, but for those of other versions of torch or Triton.

    Args:
        path: of the page, which need not be there
    """

    def __init__(self, path: Path) -> None:
        self.path, self.json = path, path.with_suffix(".json")
        self.cells: dict[str, dict[str, dict[str, str]]] = {check: {} for check in SECTIONS}  # check → case → GPU
        known = json.loads(self.json.read_text()) if self.json.exists() else {"stamp": "", "cells": {}}
        if known["stamp"].startswith(stamp().partition(";")[0]):
            self.cells |= known["cells"]

    def passes(self, check: str, name: str, gpu: str) -> bool:
        """Whether the case has been tried, and it passed."""
        return not self.cells[check].get(name, {}).get(gpu, FAILS).startswith(FAILS)

    def put(self, check: str, name: str, gpu: str, answer: str) -> None:
        """Take an answer in, and write both."""
        self.cells[check].setdefault(name, {})[gpu] = answer
        cells = {check: dict(sorted(rows.items())) for check, rows in self.cells.items() if rows}
        self.json.write_text(json.dumps({"stamp": stamp(), "cells": cells}, indent=1, ensure_ascii=False) + "\n")
        self.path.write_text(self.text())

    def text(self) -> str:
        limits = ", ".join(f"{GPUS[gpu].shared:,} bytes on {heading}" for gpu, heading in COLUMNS.items())
        return ABOUT.format(limits=limits) + stamp() + "\n" + self._presets() + self._tried()

    def _presets(self) -> str:
        """A row for each preset, of what was tried of it."""
        rows = [f"| {' | '.join(('', *AT_A_GLANCE, 'waits of the host'))} |", "|---" * (2 + len(AT_A_GLANCE)) + "|"]
        for name in sorted(set(self.cells["preset"]) & set(self.cells["decode"])):
            found = [self._alike(check, name) for check in AT_A_GLANCE.values()]
            passed = all(self.passes(check, name, gpu) for check in ("preset", "decode") for gpu in COLUMNS)
            rows.append(f"| {' | '.join((name, *found, NONE if passed else FAILS))} |")
        return f"\n## Presets\n\n{GLANCE}\n\n" + "\n".join(rows) + "\n" if rows[2:] else ""

    def _alike(self, check: str, name: str) -> str:
        """One answer for all GPUs, or those of each."""
        cells = [self.cells[check].get(name, {}).get(gpu, UNTRIED) for gpu in COLUMNS]
        cells = [cell.partition(";")[0].removeprefix("training ") for cell in cells]
        known = list(dict.fromkeys(cell for cell in cells if cell != UNTRIED)) or [UNTRIED]
        return known[0] if len(known) == 1 else " / ".join(cells)

    def _tried(self) -> str:
        """A row for each check: what its answers say, how many pass, and those that fail."""
        rows = [f"| {' | '.join(('', 'what is tried', *COLUMNS.values()))} |", "|---" * (2 + len(COLUMNS)) + "|"]
        faults = []
        for check, found in self.cells.items():
            heading, meaning = SECTIONS[check]
            tried = {gpu: [cells[gpu] for cells in found.values() if gpu in cells] for gpu in COLUMNS}
            passed = [
                f"{sum(not c.startswith(FAILS) for c in cells)} of {len(cells)}" if cells else UNTRIED
                for cells in tried.values()
            ]
            rows.append(f"| {' | '.join((heading, meaning, *passed))} |")
            faults += [
                f"* {heading}, {name}, {COLUMNS[gpu]}: {answer}"
                for name, cells in found.items()
                for gpu, answer in cells.items()
                if answer.startswith(FAILS)
            ]
        of = f"Cases that pass. [Every answer]({self.json.name}) is in the JSON beside this page."
        return "\n".join(["", "## All that was tried", "", of, "", *rows, *([""] if faults else []), *faults]) + "\n"
