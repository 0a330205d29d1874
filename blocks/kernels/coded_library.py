"""The library in C for quantised caches (coded_library.c): tokens to codes, and products with codes.

torch has no operator that multiplies codes: by its operators, bytes become floats in memory before they are multiplied,
and tokens become codes in two dozen steps. The library keeps a tile of tokens in registers and the nearest cache.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from blockwright.blocks.kernels.c_library import loaded
from blockwright.blocks.kernels.quantise import Codes

LANES = 16  # a row's floats are padded to a multiple, as lanes.h declares
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
