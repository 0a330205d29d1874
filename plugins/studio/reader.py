"""Read the files of runs for one answer: no file that is long, and none once the answer has taken long enough."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from blockwright.lab.report.reading import curves_of
from blockwright.lab.sweep.plan import overrides_of
from blockwright.training.result import RESULTS, UNREADABLE, Result

SECONDS = 3.0  # after which no further file is read
LEFT_OUT = Result(UNREADABLE, reason="The page leaves it out: it is too long, or the others took too long")


class Reader:
    """Reads for one answer. Folders may be untrusted, and many: what is left out counts as missing."""

    def __init__(self) -> None:
        self._end = time.monotonic() + SECONDS

    def result(self, run: Path) -> Result:
        """How a run ended, and its figures."""
        return Result.read(run) if self._reads(run / RESULTS, 1_000_000) else LEFT_OUT

    def curves(self, run: Path) -> dict[str, Any]:
        """The curves of a run; empty where it has none."""
        return curves_of(run) if self._reads(run / "curves.json", 4_000_000) else {}

    def overrides(self, run: Path) -> list[str]:
        """The overrides of a run; empty where it has none."""
        return overrides_of(run) if self._reads(run / ".hydra" / "overrides.yaml", 20_000) else []

    def _reads(self, file: Path, most: int) -> bool:
        return time.monotonic() < self._end and _size(file) <= most


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # what reads it says so
        return 0
