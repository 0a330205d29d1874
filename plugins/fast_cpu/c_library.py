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

COMPILERS = ("gcc", "clang", "cc")
SECONDS = 60


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
