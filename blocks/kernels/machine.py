"""The memory of a device, and two process settings that determine the speed of a CPU, without loss of accuracy.

**The library of fp32 matrix products.** PyTorch uses MKL, which takes a slow path on AMD processors. With
``torch.set_float32_matmul_precision("medium")`` it uses oneDNN instead, up to twice as fast there. The setting also
*allows* bf16 inside, which processors with matrix units (AMX) use, so ``auto`` chooses it only on an AMD processor, and
only after a product on this machine has shown full fp32 accuracy. The decision depends on the machine, not on timing,
so runs repeat exactly. A few rows, as in decoding, MKL multiplies faster there: ``by_mkl``. On a GPU the CPU does not
matter: there ``auto`` is full fp32 on every host, and ``high`` allows TF32.

**Whether freed memory returns to the system.** glibc returns every large tensor and gets zeroed pages for the next, 10
to 20 times slower than reusing memory. Keeping it costs only a larger resident size between steps.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from blockwright.blocks.precision import matmul_precision

Matmul = Literal["auto", "highest", "high", "medium"]
FULL_FP32 = 1e-6  # relative error of a product of 512 terms: fp32 has 3e-7, bf16 inside 2e-3
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
    if automatic:  # "medium" is for the CPU; it would allow TF32 on a GPU
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    return choice


def multiplies_by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes a CPU's products of this precision, which compiles code for every new shape; else MKL."""
    return dtype.itemsize == 2 or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")


@functools.cache
def is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


@functools.cache
def _error_of_medium() -> float:
    """Relative error of a product under ``medium``, in the Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float32) for _ in range(2))
    with matmul_precision("medium"):
        product = (a @ b).double()
    exact = a.double() @ b.double()
    return float((product - exact).norm() / exact.norm())


def reads_fast(x: Tensor) -> bool:
    """Whether MKL reads matrices faster for such rows: in plain fp32, on processors where that was measured."""
    return is_plain(x) and _pays()


def is_plain(x: Tensor) -> bool:
    """Whether x is fp32 on a CPU, without gradients, autocast or a compiler, so that its products can be redirected."""
    if torch.is_grad_enabled() or x.dtype != torch.float32 or not x.is_cpu:
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


@contextmanager
def by_mkl() -> Iterator[None]:
    """Context in which MKL computes fp32 products."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # what set_float32_matmul_precision sets too
    precision = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = precision


@functools.cache
def _pays() -> bool:
    return is_amd() and torch.backends.mkl.is_available()


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations, until the process ends.

    Returns:
        whether the C library accepted the settings; only glibc does
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No mmapped blocks, which are unmapped when freed; and never shrink the heap.
    return all(mallopt(setting, value) == 1 for setting, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST)))


def device_memory(device: torch.device) -> float:
    """Total memory of a device in bytes; inf if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return math.inf
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit, if lower
    text = limit.read_text().strip() if limit.is_file() else ""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, int(text)) if text.isdigit() else whole
