"""What a user of any library may set for a process: the precision of fp32 products, and what the allocator keeps.

*As it comes* sets nothing. *Best settings* are those that our training takes (blocks/kernels/machine.py), for everybody
alike: fp32 products by the library that is fast on this CPU and as exact, and freed memory kept in the process, asked
for before much is allocated. On a GPU neither has a meaning: torch keeps memory there anyhow.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from dataclasses import dataclass


@dataclass(frozen=True)
class Applied:
    """What was set, for the record.

    Args:
        kept_memory: whether freed memory stays in the process
        precision: of fp32 products, torch's word
        error: relative error of such a product
    """

    kept_memory: bool
    precision: str
    error: float


def return_memory() -> None:
    """Give freed memory back to the system, so that a contender that waits takes no more than it holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library keeps nothing that it could be told of
        ctypes.CDLL(None).malloc_trim(0)


def apply(tuned: bool, device: str) -> Applied:
    """Take the best settings for this process, or leave everything as it comes.

    Args:
        tuned: whether to take them
        device: cpu or cuda
    """
    import torch

    from blocks.kernels.machine import keep_freed_memory, set_float32_matmul

    kept = keep_freed_memory() if tuned and device == "cpu" else False
    if tuned and device == "cpu":
        set_float32_matmul("auto")
    return Applied(kept, torch.get_float32_matmul_precision(), product_error(device))


def product_error(device: str) -> float:
    """Relative error of an fp32 product of 512 terms at the precision in force, against fp64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = (a.to(device) @ b.to(device)).cpu().double() - exact
    return float(error.norm() / exact.norm())
