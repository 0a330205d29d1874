"""Several functions timed in turns within one process."""

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
    """Seconds of each of several works: the best of as many calls as its share of a budget allows.

    The first call, which makes memory and kernels ready, does not count, unless it outlasts the whole budget: where it
    is slow what it makes ready weighs little.

    The best, since whatever else the machine does only ever adds; over rounds the medians of these are taken.

    Args:
        works: name → what to do
        device: where it runs
        budget: seconds for all of them
        shift: how far the order is turned
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
