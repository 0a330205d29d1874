"""The end of a transfer: its table and transfer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwright.lab.transfer import answer
from blockwright.registry.extras import require
from blockwright.registry.printing import show
from blockwright.training.result import Result


def need_packages() -> None:
    """Of ``lab.sweep.endings.Ending``."""
    require("lab", "scipy", path="blockwright.lab.transfer")


def conclude(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> None:
    """Print the answer of a transfer and write it; of ``lab.sweep.endings.Ending``."""
    found = answer.read(directory, plan)
    show(answer.table(found))
    print(*answer.lines(found), answer.write(directory, found), sep="\n")
