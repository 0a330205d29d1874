"""A library in C for quantised caches (coded_library.c): tokens to codes, and attention by products with codes.

torch has no operator that multiplies codes: by its operators, bytes become floats in memory before they are multiplied,
and tokens become codes in two dozen steps, which take as long as a token's attention to 2,000 others. The library keeps
a tile of tokens in registers and the nearest cache. Where no compiler is found, torch computes the same.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels import coded_attention
from blockwright.blocks.kernels.coded_attention import Codes, Products, attend_by
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import kernel
from blockwright.plugins.fast_cpu.c_library import WIDE, loaded

A_THREAD = 32  # tokens, of which a thread takes longer than it needs to start
WIDEST = 4096  # numbers of a head, of which a tile of tokens is on the stack


class _Coded(ctypes.Structure):
    """``struct coded`` of coded_library.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "sizes")),
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "code_row", "code_token", "scale_row", "scale_token")),
        *((name, ctypes.c_int64) for name in ("bits", "n_heads", "head", "width", "used", "groups")),
    ]


class Library:
    """The functions of a compiled library. Pointers are addresses of contiguous fp32 numbers.

    scores(codes, q, m, out, threads), averages(codes, weights, m, out, parts, threads): products with m rows a head
    store(codes, x, threads): x becomes these codes
    """

    def __init__(self, made: ctypes.CDLL) -> None:
        codes, floats, count, threads = ctypes.POINTER(_Coded), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.scores, self.averages, self.store = made.coded_scores, made.coded_averages, made.coded_store
        self.scores.argtypes = (codes, floats, count, floats, threads)
        self.averages.argtypes = (codes, floats, count, floats, count, threads)
        self.store.argtypes = (codes, floats, threads)


@cache
def library() -> Library | None:
    """The compiled library; None where it cannot be."""
    found = loaded("coded_library")
    return None if found is None else Library(found)


def in_reach(of: Codes) -> bool:
    """Whether the library can address codes: on the CPU, those of a token side by side, heads not too wide."""
    tensors = all(type(t) is torch.Tensor and t.is_cpu and t.stride(-1) == 1 for t in (of.codes, of.scales))
    return tensors and of.head <= WIDEST


def described(of: Codes) -> _Coded:
    """Codes as the library takes them, while their tensors live."""
    sizes, *counts = _heads(of.sizes, of.n_heads, of.width)
    strides = (*of.codes.stride()[:2], *of.scales.stride()[:2])
    tensors = of.codes.data_ptr(), of.scales.data_ptr(), ctypes.addressof(sizes)
    return _Coded(*tensors, *of.codes.shape[:2], *strides, of.bits, of.n_heads, *counts)


@cache
def _heads(sizes: tuple[int, ...], n_heads: int, width: int) -> tuple[ctypes.Array[ctypes.c_int64], int, int, int, int]:
    """Sizes of the groups of a token, in memory that stays; of a head its numbers, ``width``, groups of these, all."""
    empty = torch.empty(0, dtype=torch.float32)
    of = Codes(empty, empty, 8, sizes, n_heads, width)
    return (ctypes.c_int64 * len(sizes))(*sizes), of.head, width, len(of.groups), len(sizes) // n_heads


# --- attention --------------------------------------------------------------------------------------------------------


def suits(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> bool:
    """Whether ``parts`` could compute it, the library reaches the codes, and there is a compiler."""
    near = in_reach(keys) and in_reach(values)
    return near and coded_attention.suits(q, keys, values, scoring) and library() is not None


@kernel("coded_attention", "compiled", devices=("cpu",), takes=suits, order=10)
def compiled_attention(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """The same by products in C."""
    return attend_by(Products(_scores, _averages), q, keys, values, scoring)


def _scores(q: Tensor, keys: Codes) -> Tensor:
    made = library()
    assert made is not None
    B, K, m, H = q.shape
    rows = F.pad(q, (0, -H % WIDE)) if H % WIDE else q.contiguous()
    y = q.new_empty(B, K, m, keys.codes.shape[1])
    made.scores(described(keys), rows.data_ptr(), m, y.data_ptr(), torch.get_num_threads())
    return y


def _averages(weights: Tensor, values: Codes) -> Tensor:
    made, threads = library(), torch.get_num_threads()
    assert made is not None
    (B, K, m, _), weights = weights.shape, weights.contiguous()
    parts = -(-threads // B)
    y = weights.new_zeros(parts, B, K, m, -(-values.width // WIDE) * WIDE)
    made.averages(described(values), weights.data_ptr(), m, y.data_ptr(), parts, threads)
    return (y[0] if parts == 1 else y.sum(0))[..., : values.width]


# --- new tokens -------------------------------------------------------------------------------------------------------


def suits_store(x: Tensor, into: Codes) -> bool:
    """Whether there are as many tokens as codes, the library reaches both, nothing needs a gradient or is traced, and
    there is a compiler."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return False
    alike = x.shape == (*into.codes.shape[:2], sum(into.sizes))  # else torch broadcasts, or raises
    return alike and in_reach(into) and library() is not None


@kernel("coding", "compiled", devices=("cpu",), takes=suits_store, order=10)
def store_compiled(x: Tensor, into: Codes) -> Codes:
    """``store`` in C: codes and scales are equal bit by bit."""
    made, tokens = library(), x.shape[0] * x.shape[1]
    assert made is not None
    floats = x.float().contiguous()
    made.store(described(into), floats.data_ptr(), min(torch.get_num_threads(), -(-tokens // A_THREAD)))
    return into
