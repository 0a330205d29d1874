"""The end of a ladder: its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwright.lab.ladder import report
from blockwright.training.result import Result


def need_packages() -> None:
    """Of ``lab.sweep.endings.Ending``."""
    report.need_packages()


def conclude(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> None:
    """Print the verdicts of a ladder and write its report; of ``lab.sweep.endings.Ending``."""
    report.conclude(directory)
