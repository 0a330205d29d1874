"""A small library in C for quantised caches, which a compiler on this machine makes for its processor.

torch has no operator that multiplies codes: by its operators, bytes become floats in memory before they are multiplied,
and tokens become codes in two dozen steps. The library (coded_library.c) keeps a tile of tokens in registers and the
nearest cache. It is compiled at the first use, in less than a second, into a folder that is removed once it is loaded.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from blockwright.blocks.kernels.quantise import Codes

COMPILERS = ("gcc", "clang", "cc")
SOURCE = Path(__file__).with_suffix(".c")
LANES = 16  # a row's floats are padded to a multiple, as coded_library.c declares
WIDEST = 4096  # numbers of a head, of which a tile of tokens is on the stack
SECONDS = 60


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

    def __init__(self, path: str) -> None:
        loaded = ctypes.CDLL(path, mode=os.RTLD_NOW)
        codes, floats, count, threads = ctypes.POINTER(_Coded), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.scores, self.averages, self.store = loaded.coded_scores, loaded.coded_averages, loaded.coded_store
        self.scores.argtypes = (codes, floats, count, floats, threads)
        self.averages.argtypes = (codes, floats, count, floats, count, threads)
        self.store.argtypes = (codes, floats, threads)


@cache
def library() -> Library | None:
    """The compiled library; None where there is no compiler, or none that takes the source."""
    named = (os.environ.get("CC"), *COMPILERS)
    compiler = next((path for name in named if name and (path := shutil.which(name))), None)
    if compiler is None or not SOURCE.is_file():
        return None
    for threads in (["-fopenmp"], []):  # by the OpenMP that torch has loaded, if it is the compiler's
        try:
            return _built(compiler, threads)
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _built(compiler: str, options: list[str]) -> Library:
    """Compile and load the library.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be
    """
    with tempfile.TemporaryDirectory(prefix="blockwright-") as folder:
        compiled, linked = Path(folder) / "coded.o", Path(folder) / "coded.so"
        # Linked without an OpenMP: a second one would compete with torch's for the processors.
        first = [compiler, "-c", "-O3", "-march=native", "-fPIC", "-w", *options, "-o", str(compiled), str(SOURCE)]
        for command in (first, [compiler, "-shared", "-o", str(linked), str(compiled)]):
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
        return Library(str(linked))


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
    empty = torch.empty(0)
    of = Codes(empty, empty, 8, sizes, n_heads, width)
    return (ctypes.c_int64 * len(sizes))(*sizes), of.head, width, len(of.groups), len(sizes) // n_heads
