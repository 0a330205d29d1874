"""Run a section: its cases one after the other in one process, which is killed when the section's time is up.

A process of its own, since an illegal access spoils CUDA for its process, and a collective may never return. After an
error the next case gets a new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.race import Entry, FailedError, Process
from tests.gpu.answer import FAIL, NOT_REACHED
from tests.gpu.sections import Section

PATIENCE = 60  # seconds after which a case that is killed has failed; before, there was no time for it


class Setting(NamedTuple):
    """device: cpu or cuda; small: whether sizes are those of a test; threads: of a CPU; only: part of a case's name;
    answered: section and case, of an earlier run."""

    device: str
    small: bool
    threads: int
    only: str = ""
    answered: frozenset[tuple[str, str]] = frozenset()


class Row(NamedTuple):
    """One case of the report."""

    section: str
    case: str
    result: str
    detail: str
    figures: dict[str, Any]
    seconds: float


def run(section: Section, setting: Setting) -> Iterator[Row]:
    """Its rows, each as soon as it is known."""
    end = time.monotonic() + section.seconds
    process, cases, error = _begin(section, setting, end)
    if process is None:
        yield Row(section.title, "start", FAIL, error, {}, 0.0)
        return
    for case in cases:
        begun = time.monotonic()
        if begun >= end:
            yield Row(section.title, case, NOT_REACHED, "the section's time was up", {}, 0.0)
            continue
        if process is None:
            process, _, error = _begin(section, setting, end)
        if process is None:
            yield Row(section.title, case, NOT_REACHED, f"no process: {error}", {}, 0.0)
            continue
        try:
            answer = _until(end, process, lambda p=process, c=case: p.ask({"case": c}))
        except FailedError as failure:
            process.end()
            hurried = time.monotonic() >= end and time.monotonic() - begun < PATIENCE
            result = NOT_REACHED if hurried else FAIL
            process, answer = None, {"result": result, "detail": str(failure), "figures": {}}
        yield Row(section.title, case, **answer, seconds=round(time.monotonic() - begun, 2))
    if process is not None:
        process.end()


def _begin(section: Section, setting: Setting, end: float) -> tuple[Process | None, list[str], str]:
    """A process, the names of its cases, and why there is none."""
    entry = Entry(section.title, section.job, {"small": setting.small}, tuned=False)
    process = Process(entry, setting.device, setting.threads)
    try:
        cases = _until(end, process, process.ready)["cases"]
    except FailedError as failure:
        process.end()
        return None, [], str(failure)
    wanted = [case for case in cases if setting.only in case and (section.title, case) not in setting.answered]
    return process, wanted, ""


def _until(end: float, process: Process, call: Callable[[], Any]) -> Any:
    """A call, for whose answer the process is killed at some time."""
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        process.child.kill()

    timer = threading.Timer(max(0.1, end - time.monotonic()), kill)
    timer.start()
    try:
        return call()
    except FailedError as failure:
        raise FailedError("killed: the section's time was up") if killed.is_set() else failure from None
    finally:
        timer.cancel()
