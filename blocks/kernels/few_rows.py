"""Products of a few rows with a matrix, as in decoding, where reading the matrix dominates.

For y = x Wᵀ with one row on two Zen 4 cores, MKL reads W at 9 GB/s with one thread, and oneDNN at 7 to 15. The same as
a batched product of parts of W with the row as their column reaches 20 to 40 GB/s in MKL, if the columns are a view of
the rows: a copy takes another path, at 3.5. So fp32 goes to MKL here, even where larger products go to oneDNN (see
machine.py). Several rows are fastest as the columns of one product with the whole of W: two then take 1.1 times as long
as one, in parts 1.35 times; three take longer than four.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.machine import is_amd

FEW = 4  # rows
PARTS = 16  # of the matrix


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: ``torch.nn.functional.linear``, faster for a few rows.

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
    with by_mkl():
        if len(rows) == 1:
            columns = torch.bmm(weight.view(PARTS, n // PARTS, k), rows.t().expand(PARTS, k, -1)).view(n, 1)
        else:
            even = rows if len(rows) != 3 else F.pad(rows, (0, 0, 0, 1))
            columns = (weight @ even.t())[:, : len(rows)]
    y = columns.t().contiguous().view(*x.shape[:-1], n)
    return y if bias is None else y.add_(bias)


def few(x: Tensor, weight: Tensor) -> bool:
    """Whether the fast path for a few rows is possible and pays off."""
    if x.numel() > FEW * x.shape[-1] or not reads_fast(x) or not x.numel():
        return False
    whole = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_contiguous()
    return whole and weight.dtype == torch.float32 and not weight.shape[0] % PARTS


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


@cache
def _pays() -> bool:
    return is_amd() and torch.backends.mkl.is_available()
