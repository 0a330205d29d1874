"""The suite's budget of time: what a quick test, a file of them, and all of them may cost.

A quick test has 2 seconds of the processor, a file 10, the quick suite 480: four minutes on two idle cores. What needs
more is marked ``slow``. Processes that a test starts count too. On a slow or busy machine the same work takes more
seconds, so they are counted in those of one machine: each worker times a small piece of work now and then.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest

OF_A_TEST, OF_A_FILE, OF_ALL = 2.0, 10.0, 480.0
# Files that may take more, and why.
OF_THESE_FILES = {
    "tests/blocks/test_conformance.py": 60.0,  # every registered block, by every promise that it makes
}
ROOM = 1.5  # measured seconds vary: a test fails the run where it takes so many times its budget
PIECE = 0.0142  # seconds of the processor for ``_piece`` where the budget is meant for: two busy threads of one core
EVERY_S = 20.0
TICK = os.sysconf("SC_CLK_TCK")


def _piece() -> float:
    start, n = time.process_time(), 0
    for i in range(200_000):
        n += i & 7
    return time.process_time() - start


def _spent() -> float:
    """Seconds of the processor, of this process and all that it has started."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    with suppress(OSError):  # elsewhere than on Linux, of those alone that have ended
        for task in Path("/proc/self/task").iterdir():
            for child in (task / "children").read_text().split():
                with suppress(OSError):
                    fields = Path("/proc", child, "stat").read_text().rpartition(")")[2].split()
                    shared = "warm.py" in Path("/proc", child, "cmdline").read_text()  # its start is no test's
                    total += sum(map(int, fields[13 if shared else 11 : 15])) / TICK
    return total


class Budget:
    """Plug-in of pytest that measures tests, names those beyond the budget, and with ``--budget`` fails the run."""

    def __init__(self) -> None:
        self.pieces: list[float] = []
        self.timed = -EVERY_S
        self.last = False
        self.tests: dict[str, float] = {}
        self.files: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        self.last = nextitem is None
        if time.monotonic() - self.timed > EVERY_S:
            self.pieces.append(min(_piece(), _piece()))
            self.timed = time.monotonic()
        item.stash[SINCE] = _spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        report: Any = yield
        now = item.stash[SINCE] if self.last and call.when == "teardown" else _spent()  # of all: ``warm`` has ended
        slower = max(1.0, median(self.pieces) / PIECE)
        report.user_properties.append(("cpu", (now - item.stash[SINCE]) / slower))
        item.stash[SINCE] = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the process that reports, under xdist too. A module's fixture counts to the file, not to a test."""
        cpu = dict(report.user_properties).get("cpu", 0.0)
        assert isinstance(cpu, float)
        self.files[report.nodeid.split("::")[0]] += cpu
        if report.when == "call":
            self.tests[report.nodeid] = cpu

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        folders: Counter[str] = Counter()
        for file, seconds in self.files.items():
            folders["/".join(file.split("/")[:2])] += seconds
        all_ = sum(folders.values())
        most = ", ".join(f"{name} {seconds:.0f}" for name, seconds in folders.most_common(8))
        if all_ > 60:
            terminalreporter.write_line(f"{all_:.0f} CPU-seconds: {most}")
        if config.option.markexpr == "not slow":
            for line in self.beyond():
                terminalreporter.write_line(line, red=config.option.budget)

    def beyond(self) -> list[str]:
        """What is beyond the budget, in words."""
        measured = [
            (self.tests, OF_A_TEST),
            (self.files, OF_A_FILE),
            ({"the quick suite": sum(self.files.values())}, OF_ALL),
        ]
        return [
            f"beyond the budget of {budget:.0f} CPU-seconds: {name} takes {seconds:.1f}"
            for found, usual in measured
            for name, seconds in found.items()
            if seconds > ROOM * (budget := OF_THESE_FILES.get(name, usual))
        ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        options = session.config.option
        asked = options.budget and options.markexpr == "not slow" and not hasattr(session.config, "workerinput")
        if asked and self.beyond() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


SINCE = pytest.StashKey[float]()
