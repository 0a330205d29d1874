"""Process settings for any library: precision of fp32 products, and memory kept by the allocator.

*As it comes* sets nothing. *Best settings* are those of our training, for all contenders: fp32 products in the ways
that are fastest on this CPU at the shapes of the contender (blocks/kernels/timing.py), of which a peer, whose layers
are torch's, has the library; and freed memory kept in the process, set before much is allocated. On a GPU neither
matters: torch keeps memory there anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from dataclasses import dataclass
from typing import Any

USUAL = {(512, 512): 8, (1536, 512): 8, (512, 1536): 4}  # matrices for a job that holds no model


@dataclass(frozen=True)
class Applied:
    """The applied settings, for the record.

    Args:
        kept_memory: whether freed memory stays in the process
        precision: of fp32 products, in torch's terms
        error: relative error of such a product
        measured: each way of computing products against torch's own
    """

    kept_memory: bool
    precision: str
    error: float
    measured: list[str]


def return_memory() -> None:
    """Return freed memory to the system, so that a waiting contender takes no more than it uses."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory(tuned: bool, device: str) -> bool:
    """Keep freed memory in this process, if it has the best settings; whether that was possible."""
    from blockwright.blocks.kernels.machine import keep_freed_memory

    return keep_freed_memory() if tuned and device == "cpu" else False


def multiply(tuned: bool, device: str, kept_memory: bool, job: object) -> Applied:
    """Multiply in this process as is fastest for the models of a job, or as torch does.

    Args:
        tuned: whether this process has the best settings
        device: cpu or cuda
        kept_memory: for the record
        job: which holds models, or what has one as its ``module``
    """
    import torch
    from torch import nn

    from blockwright.blocks.kernels.products import use, used
    from blockwright.blocks.kernels.timing import fastest, matrices

    if tuned and device == "cpu":
        held: list[Any] = [each for value in vars(job).values() for each in (value, getattr(value, "module", None))]
        use(fastest(matrices(*(each for each in held if isinstance(each, nn.Module))) or USUAL))
    found = [str(each) for each in used().found]
    return Applied(kept_memory, torch.get_float32_matmul_precision(), product_error(device), found)


def product_error(device: str) -> float:
    """Relative error of an fp32 product of 512 terms at the current precision, against fp64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = (a.to(device) @ b.to(device)).cpu().double() - exact
    return float(error.norm() / exact.norm())
