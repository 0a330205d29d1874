"""One rank of a training, started by torchrun: ``-m tests.gpu.rank CASE MODEL DEVICE STEPS FILE``."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from benchmarks.worker import peak_memory
from blockwright.training.entry.execute import leave_processes
from tests.gpu.strategies import CASES
from tests.training.parallel.many_ranks import MODELS, train


def main() -> None:
    """Train; rank 0 writes what it found."""
    case, model, device, steps, file = sys.argv[1:]
    ranks = int(os.environ["WORLD_SIZE"])
    strategy: Any = "auto" if ranks == 1 else CASES[case][1]
    accelerator = {"accelerator": "gpu" if device == "cuda" else "cpu"}
    found = train(MODELS[model], strategy=strategy, devices=ranks, steps=int(steps), **accelerator)
    found["extra"] = peak_memory(device) / 1e6
    if int(os.environ["RANK"]) == 0:
        torch.save(found, file)
    leave_processes()


if __name__ == "__main__":
    main()
