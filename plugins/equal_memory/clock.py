"""Seconds of some work: by the clock on the wall, and of the processor that this process had."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seconds:
    """What some work took.

    Args:
        processor: CPU-seconds of all threads of this process
        wall: seconds that passed
    """

    processor: float
    wall: float

    def __truediv__(self, times: int) -> Seconds:
        return Seconds(self.processor / times, self.wall / times)

    def on(self, device: torch.device) -> float:
        """Those that count: of the processor if it computes, since other programs then change little, else all."""
        return self.processor if device.type == "cpu" else self.wall


def timed(work: Callable[[], object], device: torch.device) -> Seconds:
    """Time one call, and everything that it starts on the device."""
    _wait(device)
    start = Seconds(time.process_time(), time.perf_counter())
    work()
    _wait(device)
    return Seconds(time.process_time() - start.processor, time.perf_counter() - start.wall)


def unit(device: torch.device) -> str:
    """What tokens are counted by."""
    return "CPU-second" if device.type == "cpu" else "second"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
