"""What has never run on a GPU, tried on the first one that is here: ``python -m tests.gpu``.

Under 30 minutes, on as many GPUs as are visible. An error in one section ends no other; the report says pass, fail or
not reached for each case, and is written again after each. The same command continues where it was stopped, with what
the report lacks. ``--device cpu --small`` tries the code of this itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from blockwright.registry import ConfigError
from tests.gpu.report import before, has_failed, write
from tests.gpu.run import Setting, run
from tests.gpu.sections import SECTIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """Try everything; 1 if something failed, 64 without a GPU."""
    titles = [section.title for section in SECTIONS]
    options = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--small", action="store_true", help="at the sizes of a test")
    options.add_argument("--sections", nargs="+", choices=titles, default=titles, help="default: all")
    options.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    options.add_argument("--minutes", type=float, default=25, help="of all sections (default: %(default)s)")
    options.add_argument("--threads", type=int, default=machine.cores())
    options.add_argument("--out", type=Path, default=Path("gpu_report"), help="folder (default: %(default)s)")
    given = options.parse_args(arguments)
    if given.device == "cuda" and not _has_gpu():
        print("error: torch finds no GPU; --device cpu --small tries the code of this command without one")
        return 64
    about = machine.about(given.device, given.threads)
    setting = Setting(given.device, given.small, given.threads, given.only)
    try:
        rows = before(given.out, about, given.small)
    except ConfigError as error:
        print(f"error: {error}")
        return 64
    setting = setting._replace(answered=frozenset((row.section, row.case) for row in rows))
    end, factor = time.monotonic(), given.minutes * 60 / sum(section.seconds for section in SECTIONS)
    for section in [section for section in SECTIONS if section.title in given.sections]:
        end += section.seconds * factor  # what one section leaves is the next one's
        for row in run(section._replace(seconds=end - time.monotonic()), setting):
            rows.append(row)
            write(rows, {**about, "small": given.small}, given.out)
            print(f"{time.strftime('%H:%M:%S')} {row.section} · {row.case}: {row.result} {row.detail}", flush=True)
    print(f"Report: {given.out / 'gpu.md'}")
    return int(has_failed(rows))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("\nstopped: the same command continues with what the report lacks")
        raise SystemExit(130) from None
