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

from blockwright.blocks.kernels.grouped_matmul import Choices
from blockwright.blocks.kernels.products import asked_for, by_mkl, is_plain
from blockwright.blocks.kernels.seam import kernel
from blockwright.plugins.fast_cpu.c_library import WIDE, loaded, takes

FEW = 4  # rows
PARTS = 16  # of the matrix
FEW_COMPILED = 8  # rows
TOGETHER = 8  # rows of the matrix come in multiples, of which TOGETHER of few_rows.c is a part
PAIRS = 64  # of a token and an expert
LEAST = 256  # columns; for models of narrower matrices a compiler would take longer than it saves


def suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``compiled`` takes rows and a matrix."""
    n, k = weight.shape
    if not 0 < x.numel() <= FEW_COMPILED * k or x.shape[-1] != k or k < LEAST or n % TOGETHER or k % WIDE:
        return False
    return is_plain(x) and _is_whole(weight) and takes("few_rows", x, weight)


@kernel("linear", "few_rows", devices=("cpu",), takes=suits, automatic=False, order=10)
def compiled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` in C."""
    (n, k), rows, y = weight.shape, x.contiguous(), x.new_empty(*x.shape[:-1], weight.shape[0])
    _library().few_rows(
        rows.data_ptr(), rows.numel() // k, weight.data_ptr(), n, k, y.data_ptr(), torch.get_num_threads()
    )
    return y if bias is None else y.add_(bias)


@cache
def _library() -> ctypes.CDLL:
    library, count, floats, number = loaded("few_rows"), ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    assert library is not None
    library.few_rows.argtypes = (floats, count, floats, count, count, floats, number)
    library.few_experts.argtypes = (*[floats] * 7, *[count] * 5, number)
    return library


def suits_experts(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> bool:
    """Whether ``experts`` takes few tokens' choices, where ``few_rows`` is asked for rows as many."""
    (_, D, F_), weights = down.shape, choices.weights
    if not 0 < choices.experts.numel() <= PAIRS or D < LEAST or D % WIDE or F_ % WIDE:
        return False
    if not any(way.name == "few_rows" for way in asked_for(len(x))) or weights.dtype != torch.float32:
        return False
    whole = choices.experts.dtype == torch.int64 and _is_whole(gate_up) and _is_whole(down)
    return whole and is_plain(x) and takes("few_rows", x, *choices[:2], gate_up, down)


@kernel("experts", "compiled", devices=("cpu",), takes=suits_experts, order=9)
def experts(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
    """``swiglu_experts`` of a few tokens in C: of the experts, those that are chosen are read, once."""
    (T, k), (E, D, F_) = choices.experts.shape, down.shape
    y, room = x.new_empty(T, D), x.new_empty(T * k * (2 * D + 3 * F_))
    given = (x.contiguous(), choices.experts.contiguous(), choices.weights.contiguous(), gate_up, down, room, y)
    _library().few_experts(*(t.data_ptr() for t in given), T, k, E, D, F_, torch.get_num_threads())
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
