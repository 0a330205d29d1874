"""What a user of any library may set for a whole process: the precision of fp32 products, and what the allocator keeps.

*As it comes* sets nothing. *Best settings* are, on a CPU: ``torch.set_float32_matmul_precision("medium")``, which sends
fp32 products to oneDNN, if its error here is that of fp32; and memory kept by glibc's malloc instead of returned to the
system after every step, asked for before torch allocates. On a GPU neither has a meaning: torch keeps memory there
anyhow, and ``medium`` rounds to bf16, which the measured error refuses.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
FP32_ERROR = 2e-6  # relative, of a product of 512 terms; bf16's is 3e-3, TF32's 4e-4


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


def libc() -> Any:
    """glibc, or None where the C library is another."""
    try:
        found = ctypes.CDLL("libc.so.6")
        return found if hasattr(found, "mallopt") and hasattr(found, "malloc_trim") else None
    except OSError:
        return None


def keep_memory() -> bool:
    """Keep freed memory in the process; before torch is imported. False where there is no glibc."""
    library = libc()
    if library is None:
        return False
    largest = 2**31 - 1
    return all([library.mallopt(M_MMAP_THRESHOLD, largest), library.mallopt(M_TRIM_THRESHOLD, largest)])


def return_memory() -> None:
    """Give freed memory back to the system, so that a contender that waits takes no more than it holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    library = libc()
    if library is not None:
        library.malloc_trim(0)


def apply(tuned: bool, device: str, kept: bool) -> Applied:
    """Choose the precision of fp32 products.

    Args:
        tuned: whether to leave torch's default if a faster one is as good
        device: where the products run
        kept: what ``keep_memory`` said
    """
    import torch

    if tuned:
        torch.set_float32_matmul_precision("medium")
        if product_error(device) > FP32_ERROR:
            torch.set_float32_matmul_precision("highest")
    return Applied(kept, torch.get_float32_matmul_precision(), product_error(device))


def product_error(device: str) -> float:
    """Relative error of an fp32 product of 512 terms at the precision in force, against fp64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = (a.to(device) @ b.to(device)).cpu().double() - exact
    return float(error.norm() / exact.norm())
