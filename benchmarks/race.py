"""A race: contenders in processes of their own take turns, in an order that shifts from round to round.

So each meets the same machine: what drifts (heat, neighbours) drifts for all, and a ratio is taken within a round. Only
one works at a time. A contender that fails is left out from then on, and its failure is recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class FailedError(RuntimeError):
    """A contender could not do what it was told."""


@dataclass
class Entry:
    """A place in a race.

    Args:
        label: unique in the race
        job: ``module:class`` of what runs
        arguments: it is built with
        tuned: whether the process has the best settings
    """

    label: str
    job: str
    arguments: Mapping[str, Any]
    tuned: bool = True
    about: dict[str, Any] = field(default_factory=dict)
    turns: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: str | None = None


class Process:
    """A worker at the other end of two pipes."""

    def __init__(self, entry: Entry, device: str, threads: int) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 # as long as the process lives
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # nothing here is to be fetched
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
        self.child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=environment,
            text=True,
            stderr=self.log,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.child.stdin is not None and self.child.stdout is not None
        self.orders, self.answers = self.child.stdin, self.child.stdout
        order = {"job": entry.job, "arguments": entry.arguments, "tuned": entry.tuned}
        self._tell({**order, "device": device, "threads": threads})

    def ready(self) -> dict[str, Any]:
        """Wait until its job is built; what the job says of itself.

        Raises:
            FailedError: it could not be
        """
        return self._hear()

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line and wait for the answer.

        Raises:
            FailedError: it answered with an error, or ended
        """
        self._tell(order)
        return self._hear()

    def _tell(self, order: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer will be that it has ended
            self.orders.write(json.dumps(order) + "\n")
            self.orders.flush()

    def _hear(self) -> dict[str, Any]:
        line = self.answers.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with {self.child.wait()}"}
        if "error" in answer:
            self.log.seek(0)
            print(self.log.read()[-4000:], file=sys.stderr)
            raise FailedError(answer["error"])
        return answer

    def end(self) -> None:
        """Let the process go."""
        with contextlib.suppress(BrokenPipeError):
            self.orders.close()
        self.answers.close()
        try:
            self.child.wait(20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.log.close()


class Race:
    """The contenders of a table, started; a context manager that ends them.

    Args:
        entries: who takes part
        device: cpu or cuda
        threads: of each contender, when its turn comes
    """

    def __init__(self, entries: Sequence[Entry], device: str, threads: int) -> None:
        self.entries, self.device, self.threads = list(entries), device, threads
        self.processes: dict[str, Process] = {}

    def __enter__(self) -> Race:
        # Two at a time: they import for seconds, and what they build may be large.
        for start in range(0, len(self.entries), 2):
            pair = self.entries[start : start + 2]
            for entry in pair:
                self.processes[entry.label] = Process(entry, self.device, self.threads)
            for entry in pair:
                try:
                    entry.about = self.processes[entry.label].ready()
                except FailedError as error:
                    entry.failed = str(error)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.processes.values():
            process.end()

    def run(self, rounds: int, seconds: float, least: int = 2, **turn: Any) -> None:
        """Rounds of turns, until there are enough or the time is up.

        Args:
            rounds: at most
            seconds: after which no round begins, once there are ``least``
            least: rounds that are run whatever they take
            turn: what every contender is told
        """
        started = time.monotonic()
        for index in range(rounds):
            if index >= least and time.monotonic() - started > seconds:
                break
            for entry in self.order(index):
                answer = self.ask(entry, turn)
                if answer is not None:
                    entry.turns[index] = answer
            print(f"  round {index + 1}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def ask(self, entry: Entry, turn: Mapping[str, Any]) -> dict[str, Any] | None:
        """One turn of one contender; None if it fails, or has failed before."""
        if entry.failed is not None:
            return None
        try:
            return self.processes[entry.label].ask(turn)
        except FailedError as error:
            entry.failed = str(error)
            return None

    def order(self, index: int) -> list[Entry]:
        """The entries as they take their turns in a round."""
        shift = index % len(self.entries)
        return self.entries[shift:] + self.entries[:shift]
