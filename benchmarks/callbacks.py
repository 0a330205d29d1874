"""Callbacks of benchmarks: to end at the first optimizer step and print its CPU time; to time a range of steps."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import lightning as L

MARK = "first step after CPU seconds: "


class FirstStep(L.Callback):
    """Prints the CPU seconds of this process and its children, and exits at once."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        times = os.times()
        cpu = times.user + times.system + times.children_user + times.children_system
        print(f"{MARK}{cpu:.3f}", flush=True)
        sys.stderr.flush()
        os._exit(0)


class StepClock(L.Callback):
    """Times from the start of one batch to the start of another.

    Args:
        first, last: batch numbers

    Attributes:
        seconds: between the two, once the last has begun
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seconds, self._start = first, last, 0.0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.first:
            self._start = time.perf_counter()
        if batch_idx == self.last:
            self.seconds = time.perf_counter() - self._start
