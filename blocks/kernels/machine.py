"""Two settings of the process that decide the speed of a CPU, and cost no accuracy where they are chosen.

**Which library multiplies fp32 matrices.** PyTorch asks MKL, which on AMD processors takes a slow path. Under
``torch.set_float32_matmul_precision("medium")`` it asks oneDNN instead, up to twice as fast there. The setting also
*allows* bf16 inside, and processors with matrix units (AMX) use it, so ``auto`` takes it only on an AMD processor, and
only after a product of this machine has shown full fp32 accuracy. The decision is by what the machine is and not by a
stop-watch: a run repeats to the bit. What the CPU is decides nothing on a GPU: there ``auto`` is full fp32 on every
host, and ``high`` allows TF32.

**Whether freed memory goes back to the system.** glibc returns every large tensor and gets zeroed pages for the next,
10 to 20 times slower than memory that was kept. Keeping it costs nothing but a larger resident size between steps.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Literal

import torch

Matmul = Literal["auto", "highest", "high", "medium"]
FULL_FP32 = 1e-6  # relative error of a product of 512 terms: fp32 makes 3e-7, bf16 inside 2e-3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_MOST = 2**31 - 1


def set_float32_matmul(choice: Matmul, device_type: str = "cpu") -> str:
    """Choose how fp32 matrices are multiplied.

    Args:
        choice: a value of ``torch.set_float32_matmul_precision``, or ``auto``
        device_type: of the device that computes

    Returns:
        what was set
    """
    automatic = choice == "auto"
    if automatic:
        faster = device_type == "cpu" and is_amd() and _error_of_medium() < FULL_FP32
        choice = "medium" if faster else "highest"
    torch.set_float32_matmul_precision(choice)
    if automatic:  # "medium" is meant for the CPU, and would let a GPU round to TF32
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    return choice


@functools.cache
def is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


@functools.cache
def _error_of_medium() -> float:
    """Relative error of a product under ``medium``, in the Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        product = (a @ b).double()
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double()
    return float((product - exact).norm() / exact.norm())


def keep_freed_memory() -> bool:
    """Make glibc keep what is freed for the next allocation, until the process ends.

    Returns:
        whether the C library took the settings; others than glibc do not know them
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No block by mmap, which would be unmapped when freed; and the heap is never cut back.
    return all(mallopt(setting, value) == 1 for setting, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST)))
