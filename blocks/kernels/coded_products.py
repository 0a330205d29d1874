"""``coded_attention`` by a small library in C, which a compiler on this machine makes for its processor.

torch has no operator that multiplies codes: by its operators, bytes become floats in memory before they are multiplied.
The library (coded_products.c) keeps them in registers and the nearest cache. It is compiled at the first use, in less
than a second, into a folder that is removed once it is loaded; where no compiler is found, ``parts`` computes.
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
from torch import Tensor

from blockwright.blocks.kernels import coded_attention
from blockwright.blocks.kernels.coded_attention import Products, attend_by
from blockwright.blocks.kernels.quantise import Codes
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import kernel

COMPILERS = ("gcc", "clang", "cc")
SOURCE = Path(__file__).with_suffix(".c")
LANES = 16  # a row's floats are padded to a multiple, as coded_products.c declares
WIDEST = 4096  # numbers of a head, of which a tile of tokens is on the stack
SECONDS = 60


class _Coded(ctypes.Structure):
    """``struct coded`` of coded_products.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "sizes")),
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "code_row", "code_token", "scale_row", "scale_token")),
        *((name, ctypes.c_int64) for name in ("bits", "n_heads", "head", "width", "used", "groups")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled products; None where there is no compiler, or none that takes the source."""
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


def _built(compiler: str, options: list[str]) -> ctypes.CDLL:
    """Compile and load the library.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be
    """
    with tempfile.TemporaryDirectory(prefix="blockwright-") as folder:
        compiled, linked = Path(folder) / "products.o", Path(folder) / "products.so"
        # Linked without an OpenMP: a second one would compete with torch's for the processors.
        first = [compiler, "-c", "-O3", "-march=native", "-fPIC", "-w", *options, "-o", str(compiled), str(SOURCE)]
        for command in (first, [compiler, "-shared", "-o", str(linked), str(compiled)]):
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
        return ctypes.CDLL(str(linked), mode=os.RTLD_NOW)


def suits(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> bool:
    """Whether ``parts`` could compute it, codes of a token are side by side in memory, and there is a compiler."""
    alike = all(t.stride(-1) == 1 and of.width <= WIDEST for of in (keys, values) for t in (of.codes, of.scales))
    return alike and coded_attention.suits(q, keys, values, scoring) and library() is not None


@kernel("coded_attention", "compiled", devices=("cpu",), takes=suits, order=10)
def compiled_attention(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """The same by products in C."""
    return attend_by(Products(_scores, _averages), q, keys, values, scoring)


def _scores(q: Tensor, keys: Codes) -> Tensor:
    B, K, m, H = q.shape
    padded = torch.nn.functional.pad(q, (0, -H % LANES)).contiguous()
    found = q.new_empty(B, K, m, keys.codes.shape[1])
    _call("coded_scores", keys, padded, m, found, torch.get_num_threads())
    return found


def _averages(weights: Tensor, values: Codes) -> Tensor:
    (B, K, m, _), threads = weights.shape, torch.get_num_threads()
    parts = -(-threads // B)
    found = weights.new_zeros(parts, B, K, m, -(-values.width // LANES) * LANES)
    _call("coded_averages", values, weights.contiguous(), m, found, parts, threads)
    return found.sum(0)[..., : values.width]


def _call(function: str, of: Codes, left: Tensor, m: int, out: Tensor, *numbers: int) -> None:
    """A function of the library: codes, what they are multiplied with, its m rows, the result."""
    built = library()
    assert built is not None
    sizes = (ctypes.c_int64 * len(of.groups))(*of.groups)
    strides = (t.stride(dim) for t in (of.codes, of.scales) for dim in (0, 1))
    shape = of.bits, of.n_heads, of.head, of.width, len(of.groups), len(of.sizes) // of.n_heads
    held = _Coded(
        of.codes.data_ptr(), of.scales.data_ptr(), ctypes.addressof(sizes), *of.codes.shape[:2], *strides, *shape
    )
    *parts, threads = numbers
    rows = *map(ctypes.c_int64, parts), ctypes.c_int(threads)
    pointers = ctypes.c_void_p(left.data_ptr()), ctypes.c_int64(m), ctypes.c_void_p(out.data_ptr())
    getattr(built, function)(ctypes.byref(held), *pointers, *rows)
