"""Time several functions alternately within one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from benchmarks.peak import synchronise

Work = Callable[[], object]


def seconds_of(work: Work, device: str) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def turns(works: Mapping[str, Work], device: str, *, budget: float, shift: int) -> dict[str, float]:
    """Seconds of each of several functions: the best of as many calls as fit into its share of a budget.

    The first call, which warms up memory and kernels, does not count, unless it exceeds the whole budget: for a slow
    function the warm-up matters little.

    The best, since disturbances only add time; medians of these are taken over rounds.

    Args:
        works: name → function
        device: where it runs
        budget: seconds for all of them
        shift: rotation of the order
    """
    names = list(works)
    at = shift % len(names)
    best: dict[str, float] = {}
    for name in names[at:] + names[:at]:
        best[name] = first = seconds_of(works[name], device)
        if first > budget:
            continue
        best[name] = spent = seconds_of(works[name], device)
        while spent + best[name] < budget / len(names):
            seconds = seconds_of(works[name], device)
            best[name], spent = min(best[name], seconds), spent + seconds
    return best
