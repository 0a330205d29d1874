"""Products of a few rows with a matrix, as in decoding, where reading the matrix is all the work.

Asked for y = x Wᵀ with one row, MKL reads W on an AMD processor with one thread and oneDNN without looking ahead: 9 and
7 to 15 GB/s on two Zen 4 cores. The same as a batched product of parts of W with the row as their column comes to 20 to
40 GB/s in MKL. So it goes there, in fp32, even where larger products go to oneDNN (see machine.py).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels.machine import is_amd

FEW = 4  # rows
PARTS = 16  # of the matrix


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: ``torch.nn.functional.linear``, the faster way for a few rows.

    Args:
        x: [..., K]
        weight: [N,K]
        bias: [N]

    Returns:
        [..., N]
    """
    if not few(x, weight):
        return F.linear(x, weight, bias)
    n, k = weight.shape
    rows = x.reshape(-1, k)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        columns = torch.bmm(weight.view(PARTS, n // PARTS, k), rows.t().expand(PARTS, k, -1))
    finally:
        torch.set_float32_matmul_precision(precision)
    y = columns.view(n, -1).t().contiguous().view(*x.shape[:-1], n)
    return y if bias is None else y.add_(bias)


def few(x: Tensor, weight: Tensor) -> bool:
    """Whether the way for a few rows is open, and pays: fp32 on a processor where it was measured, no gradients."""
    if x.numel() > FEW * x.shape[-1] or torch.is_grad_enabled() or not (x.is_cpu and _pays()):
        return False
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_contiguous() and not weight.shape[0] % PARTS
    return single and plain and x.numel() > 0 and not torch.compiler.is_compiling()


@cache
def _pays() -> bool:
    return is_amd() and torch.backends.mkl.is_available()
