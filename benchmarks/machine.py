"""Description of the machine of a result: device, versions, date, threads, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "transformers", "litgpt", "x-transformers", "numpy", "fla-core")


def about(device: str, threads: int) -> dict[str, Any]:
    """The metadata of a result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", *_module(), *sys.argv[1:]]),
        "device": _gpu() if device == "cuda" else _cpu(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _module() -> list[str]:
    """Of this checkout, by its name."""
    file, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    if file.suffix != ".py" or not file.is_relative_to(root):
        return [str(file)]
    return [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__main__")]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
    except OSError:
        return platform.processor()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.processor())}, {cores()} cores ({', '.join(flags)})"


def _gpu() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, driver {_driver()}"


def _driver() -> str:
    """Version of the GPU's driver; unknown where nvidia-smi is missing."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    """Commit of the checkout, with a + if files differ from it; unknown outside of one."""
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
