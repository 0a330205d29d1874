"""A process with a pretended GPU: takes cases from stdin, one JSON a line, and answers with one JSON a line.

A process of its own, because what it changes in torch cannot be undone.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.absent_gpu import shim


def main() -> None:
    """``python -m tests.absent_gpu.worker LIBRARY GPU``"""
    library, gpu = sys.argv[1:]
    shim.load(Path(library))
    answers, sys.stdout = sys.stdout, sys.stderr
    from tests.absent_gpu.device import GPUS, pretend

    pretend(GPUS[gpu])  # before torch's compiler is imported, which keeps the functions that it asks
    from tests.absent_gpu.checks import Checks
    from tests.absent_gpu.fused import pretend_fused

    pretend_fused(GPUS[gpu])
    checks = Checks(GPUS[gpu])
    for line in sys.stdin:
        asked, before = json.loads(line), sum(os.times()[:4])
        given = answer(getattr(checks, asked["check"]), asked)
        print(json.dumps({**given, "seconds": round(sum(os.times()[:4]) - before, 2)}), file=answers, flush=True)


def answer(check: Callable[..., dict[str, Any]], asked: dict[str, Any]) -> dict[str, Any]:
    """What a check found, or the error that stopped it."""
    try:
        return {**asked, "fault": None, **check(asked["of"])}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {**asked, "fault": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}


if __name__ == "__main__":
    main()
