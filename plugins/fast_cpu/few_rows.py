"""Products of a few rows with a matrix, as in decoding, where reading the matrix dominates.

``compiled`` is C (few_rows.c): the matrix is read once, at the speed of the memory, for up to 8 rows. Two rows take
1.05 times as long as one, eight 1.5 times, and a row is bit-identical whatever the others are. Small matrices and
machines without a C compiler use MKL, where up to 4 rows are faster than torch's default, MKL or oneDNN. With one row
on two Zen 4 cores, MKL reads W at 9 GB/s with one thread, and oneDNN at 7 to 15. The same as a batched product of parts
of W with the row as their column reaches 20 to 40 GB/s in MKL, if the columns are a view of the rows: a copy takes
another path, at 3.5. Several rows are fastest as the columns of one product with the whole of W; three take longer than
four. All this is of fp32, even where larger products go to oneDNN. Which of
them computes is measured (blocks/kernels/timing.py).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.products import by_mkl, is_plain
from blockwright.blocks.kernels.seam import kernel
from blockwright.plugins.fast_cpu.c_library import loaded

FEW = 4  # rows
PARTS = 16  # of the matrix
FEW_COMPILED = 8  # rows
TOGETHER, LANES = 8, 16  # rows and columns of the matrix come in multiples, as few_rows.c and lanes.h declare
LEAST = 256  # columns; for models of narrower matrices a compiler would take longer than it saves


def suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return bool(x.numel()) and is_plain(x) and suits_compiled(x, weight)


@kernel("linear", "few_rows", devices=("cpu",), takes=suits, automatic=False, order=10)
def linear_compiled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` in C."""
    y = compiled(x, weight)
    return y if bias is None else y.add_(bias)


def suits_compiled(x: Tensor, weight: Tensor) -> bool:
    """Whether ``compiled`` takes rows and a matrix, and all threads would compute."""
    n, k = weight.shape
    if x.numel() > FEW_COMPILED * k or x.shape[-1] != k or k < LEAST or n % TOGETHER or k % LANES:
        return False
    whole = type(x) is Tensor and _is_whole(weight) and weight.is_cpu
    return whole and not watched() and _has_library(torch.get_num_threads())


def watched() -> bool:
    """Whether something counts or traces torch's operators."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch.jit.is_tracing()


@cache
def _has_library(threads: int) -> bool:
    library = loaded("few_rows")
    return library is not None and bool(threads == 1 or library.few_rows_in_parallel())


def compiled(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in C."""
    library, (n, k), rows = loaded("few_rows"), weight.shape, x.contiguous()
    assert library is not None
    y = x.new_empty(*x.shape[:-1], n)
    given = rows.data_ptr(), rows.numel() // k, weight.data_ptr(), n, k, y.data_ptr()
    library.few_rows(*map(ctypes.c_int64, given), ctypes.c_int(torch.get_num_threads()))
    return y


def of_mkl(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by MKL."""
    n, k = weight.shape
    rows = x.reshape(-1, k)
    with by_mkl():
        if len(rows) == 1:
            columns = torch.bmm(weight.view(PARTS, n // PARTS, k), rows.t().expand(PARTS, k, -1)).view(n, 1)
        else:
            even = rows if len(rows) != 3 else F.pad(rows, (0, 0, 0, 1))
            columns = (weight @ even.t())[:, : len(rows)]
    return columns.t().contiguous().view(*x.shape[:-1], n)


def few(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``of_mkl`` takes rows and a matrix."""
    fits = 0 < x.numel() <= FEW * x.shape[-1] and not weight.shape[0] % PARTS
    return fits and is_plain(x) and _is_whole(weight) and torch.backends.mkl.is_available()


def _is_whole(weight: Tensor) -> bool:
    """Whether a matrix is plain fp32 numbers side by side."""
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype == torch.float32 and weight.is_contiguous()


@kernel("linear", "mkl", devices=("cpu",), takes=few, automatic=False, order=11)
def linear_of_mkl(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` by MKL."""
    y = of_mkl(x, weight)
    return y if bias is None else y.add_(bias)
