"""A callback that times a range of training steps."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


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
