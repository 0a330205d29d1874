"""Time several functions alternately within one process, and the machine's matmul peak, a contender in races."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.models.base import DTYPES
from benchmarks.race import Entry
from blockwright.training.callbacks.throughput import matmul_peak


class Peak:
    """Products of square matrices in one dtype, with the settings of its process."""

    def __init__(self, dtype: str, device: str) -> None:
        self.dtype, self.device = DTYPES[dtype], torch.device(device)

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, **ignored: Any) -> dict[str, Any]:
        return {"flops": matmul_peak(self.device, self.dtype)}


def synchronise(device: str) -> None:
    """Wait for a GPU's work; nothing to do for a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peaks(dtype: str, device: str) -> list[Entry]:
    """Entries that measure the peak of a dtype; of fp32 on a CPU with both settings, which differ there."""
    both = [True, False] if dtype == "fp32" and device == "cpu" else [True]
    return [
        Entry(
            f"matmul peak, {'best settings' if tuned else 'as it comes'}",
            "benchmarks.stopwatch:Peak",
            {"dtype": dtype},
            tuned,
        )
        for tuned in both
    ]


Work = Callable[[], object]


def seconds_of(work: Work, device: str) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def turns(works: Mapping[str, Work], device: str, *, budget: float, shift: int) -> dict[str, float]:
    """Seconds of each of several functions: the best of as many calls as fit into its share of a budget.

    The first call, which warms up memory and kernels, does not count, unless it exceeds the whole budget: for a slow
    function the warm-up matters little.

    The best, since disturbances only add time; medians of these are taken over rounds.

    Args:
        works: name → function
        device: where it runs
        budget: seconds for all of them
        shift: rotation of the order
    """
    names = list(works)
    at = shift % len(names)
    best: dict[str, float] = {}
    for name in names[at:] + names[:at]:
        best[name] = first = seconds_of(works[name], device)
        if first > budget:
            continue
        best[name] = spent = seconds_of(works[name], device)
        while spent + best[name] < budget / len(names):
            seconds = seconds_of(works[name], device)
            best[name], spent = min(best[name], seconds), spent + seconds
    return best
