"""Tries everything on GPUs that are not here: ``python -m tests.absent_gpu``. One line a case."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.absent_gpu import cases, shim
from tests.absent_gpu.device import GPUS
from tests.absent_gpu.page import Page, cell
from tests.absent_gpu.run import asked


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.absent_gpu", description=__doc__)
    options.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS), help="compute capabilities; all")
    options.add_argument(
        "--checks", nargs="+", choices=cases.NAMES, default=list(cases.NAMES), help="what is tried; all"
    )
    options.add_argument("--only", default="", help="part of the names of the cases that are tried")
    options.add_argument("--write", type=Path, help="page that takes the answers in beside those it has")
    options.add_argument("--missing", action="store_true", help="leave out what already passes on that page")
    chosen = options.parse_args()
    if chosen.missing and not chosen.write:
        options.error("--missing needs the page of --write")
    if reason := shim.missing():
        print(reason, file=sys.stderr)
        raise SystemExit(64)
    page = Page(chosen.write) if chosen.write else None
    with tempfile.TemporaryDirectory() as folder:
        failed = 0
        for check in chosen.checks:
            for gpu in chosen.gpus:
                names = [name for name in cases.NAMES[check]() if chosen.only in name]
                if page is not None and chosen.missing:
                    names = [name for name in names if not page.passes(check, name, gpu)]
                failed += _tried(check, gpu, Path(folder), names, page)
    print(f"\n{sum(os.times()[2:4]):.0f} seconds of a processor", file=sys.stderr)
    raise SystemExit(1 if failed else 0)


def _tried(check: str, gpu: str, folder: Path, names: list[str], page: Page | None) -> int:
    """Try each case, and show its answer; returns how many failed."""
    failed = 0
    for name, found in asked(gpu, folder, check, names):
        failed += bool(found["fault"])
        print(f"{check} {name} {gpu}: {cell(found)} ({found['seconds']} s)", flush=True)
        if page is not None:
            page.put(check, name, gpu, cell(found))
    return failed


if __name__ == "__main__":
    main()
