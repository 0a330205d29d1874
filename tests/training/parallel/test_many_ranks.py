"""The ranks of the tests themselves: an error and a kill end all of them."""

from __future__ import annotations

import os
import signal
import time

import pytest
from many_ranks import EndedError, spawn


def _fails_late() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(0.5)  # the other waits for the end by then
        raise ValueError("late")


def _misses_the_killed() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    raise ConnectionError("the other is gone")


def test_an_error_ends_ranks_that_wait_and_a_kill_is_told_from_it() -> None:
    with pytest.raises(AssertionError, match="late"):
        spawn(2, _fails_late)
    with pytest.raises(EndedError):
        spawn(2, _misses_the_killed)
