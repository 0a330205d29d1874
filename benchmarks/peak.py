"""The machine's matmul peak, as a contender of its own: one large square product, again and again."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.models.base import DTYPES
from benchmarks.race import Entry

SIZES = {"cpu": 1024, "cuda": 8192}


class Peak:
    """Products of square matrices in one dtype, at the settings of its process."""

    def __init__(self, dtype: str, device: str) -> None:
        size = SIZES[device]
        self.device, self.flops = device, 2 * size**3
        self.a, self.b, self.out = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(3))

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, **ignored: Any) -> dict[str, Any]:
        """FLOPs a second of the best of several products; the others met somebody else at work."""
        best = float("inf")
        for _ in range(12):
            synchronise(self.device)
            start = time.perf_counter()
            torch.mm(self.a, self.b, out=self.out)
            synchronise(self.device)
            best = min(best, time.perf_counter() - start)
        return {"flops": self.flops / best}


def synchronise(device: str) -> None:
    """Wait for what was handed to a GPU; a CPU has done it already."""
    if device == "cuda":
        torch.cuda.synchronize()


def peaks(dtype: str, device: str) -> list[Entry]:
    """Entries that measure the peak of a dtype; of fp32 on a CPU at both settings, for there they differ."""
    both = [True, False] if dtype == "fp32" and device == "cpu" else [True]
    return [
        Entry(
            f"matmul peak, {'best settings' if tuned else 'as it comes'}",
            "benchmarks.peak:Peak",
            {"dtype": dtype},
            tuned,
        )
        for tuned in both
    ]
