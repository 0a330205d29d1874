"""The table of everything that is tried on GPUs that are not here: ``python -m tests.absent_gpu``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.absent_gpu import cases, shim
from tests.absent_gpu.device import GPUS
from tests.absent_gpu.run import asked


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.absent_gpu", description=__doc__)
    options.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS), help="compute capabilities; all")
    options.add_argument(
        "--checks", nargs="+", choices=cases.NAMES, default=list(cases.NAMES), help="what is tried; all"
    )
    options.add_argument("--only", default="", help="part of the names of the cases that are tried")
    chosen = options.parse_args()
    if reason := shim.missing():
        print(reason, file=sys.stderr)
        raise SystemExit(64)
    print(
        "| check | of | GPU | result | kernels | shared memory, bytes | spilled, bytes |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        failed = sum(_rows(check, gpu, Path(folder), chosen.only) for check in chosen.checks for gpu in chosen.gpus)
    print(f"\n{sum(os.times()[2:4]):.0f} seconds of a processor", file=sys.stderr)
    raise SystemExit(1 if failed else 0)


def _rows(check: str, gpu: str, folder: Path, only: str) -> int:
    """Print a row for each case; returns how many failed."""
    failed = 0
    for name, found in asked(gpu, folder, check, [n for n in cases.NAMES[check]() if only in n]):
        fault = found["fault"]
        known = bool(fault) and cases.is_known(name, fault)
        failed += bool(fault) and not known
        result = "passes" if not fault else f"known: {cases.KNOWN[name].reason}" if known else f"FAILS: {fault[:200]}"
        figures = (f"{found[key]:,}" if key in found else "" for key in ("kernels", "shared", "spilled"))
        print("|", " | ".join((check, name, gpu, result, *figures)), "|", flush=True)
    return failed


if __name__ == "__main__":
    main()
