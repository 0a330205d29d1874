"""Process settings for any library: precision of fp32 products, and memory kept by the allocator.

*As it comes* sets nothing. *Best settings* are those of our training (blocks/kernels/machine.py), for all contenders:
fp32 products by the fastest library of full precision on this CPU, and freed memory kept in the process, set before
much is allocated. On a GPU neither matters: torch keeps memory there anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from dataclasses import dataclass


@dataclass(frozen=True)
class Applied:
    """The applied settings, for the record.

    Args:
        kept_memory: whether freed memory stays in the process
        precision: of fp32 products, in torch's terms
        error: relative error of such a product
    """

    kept_memory: bool
    precision: str
    error: float


def return_memory() -> None:
    """Return freed memory to the system, so that a waiting contender takes no more than it uses."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def apply(tuned: bool, device: str) -> Applied:
    """Apply the best settings to this process, or leave the defaults.

    Args:
        tuned: whether to apply them
        device: cpu or cuda
    """
    import torch

    from blockwright.blocks.kernels.machine import keep_freed_memory, set_float32_matmul

    kept = keep_freed_memory() if tuned and device == "cpu" else False
    if tuned and device == "cpu":
        set_float32_matmul("auto")
    return Applied(kept, torch.get_float32_matmul_precision(), product_error(device))


def product_error(device: str) -> float:
    """Relative error of an fp32 product of 512 terms at the current precision, against fp64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = (a.to(device) @ b.to(device)).cpu().double() - exact
    return float(error.norm() / exact.norm())
