"""Builds and loads shim.cpp, without importing torch: its hooks have to be there before torch is."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")


def missing() -> str | None:
    """Why no device can be pretended here; None where it can."""
    if compiler() is None:
        return "no C++ compiler is found to build the device that is pretended"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'blockwright[absent_gpu]'"
    return None


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def build(folder: Path) -> Path:
    """Compile the shim into a folder, in seconds; a library that is there already is kept."""
    library, torch = folder / "libabsent_gpu.so", _torch()
    if not library.exists():
        told = [compiler(), "-O0", "-w", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(library)]
        told += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(told, check=True, capture_output=True, text=True)
    return library


def load(library: Path) -> None:
    """Load torch's own libraries, then the shim. Call it before ``import torch``."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
