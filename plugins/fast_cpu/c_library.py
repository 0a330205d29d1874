"""Small libraries in C, which a compiler on this machine makes for its processor when they are first needed.

It takes less than a second, in a folder that is removed once the library is loaded. Nothing needs one: where there is
no compiler, torch computes the same.
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
from torch.autograd import forward_ad

COMPILERS = ("gcc", "clang", "cc")
SECONDS = 60
WIDE = 16  # numbers of a row come in multiples, as lanes.h declares
PLAIN = (Tensor, torch.nn.Parameter)


@cache
def loaded(name: str) -> ctypes.CDLL | None:
    """The library of a source next to this file; None where there is no compiler, or none that takes it."""
    source, named = Path(__file__).with_name(f"{name}.c"), (os.environ.get("CC"), *COMPILERS)
    compiler = next((path for each in named if each and (path := shutil.which(each))), None)
    if compiler is None or not source.is_file():
        return None
    for threads in (["-fopenmp"], []):  # by the OpenMP that torch has loaded, if it is the compiler's
        try:
            return _built(source, compiler, threads)
        except (OSError, subprocess.SubprocessError):
            continue
    return None


@cache
def _computes(name: str, threads: int) -> bool:
    library = loaded(name)
    return library is not None and bool(threads == 1 or library.in_parallel())


def takes(name: str, *tensors: Tensor) -> bool:
    """Whether a library may compute with these tensors: on a CPU, where no gradient, compiler, transform (``vmap``,
    ``jvp``), counter of operators or class of tensors misses anything, and with as many threads as torch has."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not all(type(t) in PLAIN and t.is_cpu for t in tensors):
        return False
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return not transformed and _computes(name, torch.get_num_threads())


def _built(source: Path, compiler: str, options: list[str]) -> ctypes.CDLL:
    """Compile and load a library.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be
    """
    with tempfile.TemporaryDirectory(prefix="blockwright-") as folder:
        compiled, linked = Path(folder) / f"{source.stem}.o", Path(folder) / f"{source.stem}.so"
        # Linked without an OpenMP: a second one would compete with torch's for the processors.
        first = [compiler, "-c", "-O3", "-march=native", "-fPIC", "-w", *options, "-o", str(compiled), str(source)]
        for command in (first, [compiler, "-shared", "-o", str(linked), str(compiled)]):
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
        return ctypes.CDLL(str(linked), mode=os.RTLD_NOW)
