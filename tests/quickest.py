"""How long something takes at its quickest: a busy or slower machine makes even CPU time longer, by turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def cpu_seconds(action: Callable[[], Any]) -> float:
    """CPU-seconds of this process that one run of ``action`` takes."""
    start = time.process_time()
    action()
    return time.process_time() - start


def quickest(measure: Callable[[], float], enough: float, tries: int = 5) -> float:
    """The least that ``measure`` returns in up to ``tries`` runs. The first below ``enough`` is the last."""
    least = float("inf")
    for _ in range(tries):
        least = min(least, measure())
        if least < enough:
            break
    return least


def takes_less(seconds: float, action: Callable[[], Any]) -> bool:
    """Whether ``action``, which may be run several times, takes less than so many CPU-seconds."""
    return quickest(lambda: cpu_seconds(action), seconds) < seconds
