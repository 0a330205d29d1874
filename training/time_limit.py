"""A limit on the time that foreign code may take."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Overdue(BaseException):
    """The time is over. Not an ``Exception``: code that catches all of its own would continue."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``Overdue`` inside the block after some seconds, and again every second until the block ends.

    By the alarm signal, which interrupts Python, regular expressions, sleeping and waiting. Not compiled code that
    never looks for signals; and outside the main thread, which alone receives them, there is no limit.

    Args:
        seconds: of wall-clock time; infinity for no limit
    """
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        raise Overdue(f"took longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, end)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer)  # an outer limit ends later than it would have, but ends
        signal.signal(signal.SIGALRM, before)
