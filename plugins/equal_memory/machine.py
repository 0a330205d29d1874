"""What a machine reaches in the two things that decoding waits for: products, and reading memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from blockwright.plugins.equal_memory.clock import timed

WIDTH = {"cpu": 1024, "cuda": 8192}  # of a square product that is large for the device
READ = 2**28  # bytes at most that are read at once; as many as the caches take, if these are fewer
WORK = {"cpu": 2e9, "cuda": 2e12}  # FLOPs or bytes of a measurement, at least


@dataclass(frozen=True)
class Peaks:
    """The rates of a machine.

    Args:
        flops: FLOP/s of a large square product
        read: bytes/s of a sum over memory
    """

    flops: float
    read: float


class Machine:
    """Measures the rates of a device, with the threads and the dtype of the arms.

    Args:
        device: that computes
        dtype: of the products
        memory: bytes that decoding reads
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, memory: int) -> None:
        self.device = device
        width = WIDTH[device.type]
        self.square = torch.randn(width, width, device=device, dtype=torch.float32).to(dtype)
        self.numbers = torch.ones(max(1, min(memory, READ) // 4), device=device, dtype=torch.float32)

    def turn(self) -> Peaks:
        """Measure both once."""
        return Peaks(
            self._rate(lambda: self.square @ self.square, 2 * len(self.square) ** 3),
            self._rate(lambda: self.numbers.sum(), self.numbers.nbytes),
        )

    def _rate(self, work: Callable[[], object], amount: int) -> float:
        """Amount a second, after a call that warms up."""
        times = int(-(-WORK[self.device.type] // amount))
        work()
        return amount * times / timed(lambda: [work() for _ in range(times)], self.device).on(self.device)
