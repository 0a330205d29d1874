"""A race: contenders in separate processes take turns, in an order that shifts from round to round.

A contender is an implementation of a model family with its settings. All meet the same machine: drift (temperature,
other load) affects all, and medians and quartiles are of ratios that are taken within a round. Only one works at a
time. A contender that fails is excluded from then on, and its failure is recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from benchmarks.shapes import Family

ROOT = Path(__file__).resolve().parent.parent


class FailedError(RuntimeError):
    """A contender could not complete a request."""


@dataclass
class Entry:
    """A contender's entry in a race.

    Args:
        label: unique in the race
        job: ``module:class`` to run
        arguments: of the class
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
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # no downloads
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
        """Wait until its job is built; returns the job's description.

        Raises:
            FailedError: it could not be built
        """
        return self._hear()

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and wait for the answer.

        Raises:
            FailedError: it answered with an error, or ended
        """
        self._tell(order)
        return self._hear()

    def _tell(self, order: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer will report that it has ended
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
        """Stop the process."""
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
    """The started contenders of a table; a context manager that stops them.

    Args:
        entries: the contenders
        device: cpu or cuda
        threads: of each contender during its turn
    """

    def __init__(self, entries: Sequence[Entry], device: str, threads: int) -> None:
        self.entries, self.device, self.threads = list(entries), device, threads
        self.processes: dict[str, Process] = {}

    def __enter__(self) -> Race:
        # Two at a time: imports take seconds, and models may be large.
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
        """Run rounds of turns, up to a number or a time.

        Args:
            rounds: at most
            seconds: time limit for starting rounds, after ``least``
            least: minimum number of rounds
            turn: arguments of every contender's turn
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

    def run_cells(
        self, cells: Mapping[str, tuple[Entry, Mapping[str, Any]]], rounds: int, seconds: float, least: int
    ) -> list[dict[str, Any]]:
        """Rounds of several turns of each contender, up to a number or a time.

        Args:
            cells: name → a contender, and the arguments of one of its turns
            rounds: at most
            seconds: time limit for starting rounds, after ``least``
            least: minimum number of rounds

        Returns:
            the answers of each round, by name

        Raises:
            SystemExit: a contender has failed: a table of some cells would mislead
        """
        started, found = time.monotonic(), list[dict[str, Any]]()
        while len(found) < rounds and (len(found) < least or time.monotonic() - started < seconds):
            answers = {name: self.ask(entry, turn) for name, (entry, turn) in cells.items()}
            if failed := [f"{entry.label}: {entry.failed}" for entry in self.entries if entry.failed is not None]:
                raise SystemExit("\n".join(failed))
            found.append(answers)
            print(f"  round {len(found)}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return found

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
        """The order of the entries in a round."""
        shift = index % len(self.entries)
        return self.entries[shift:] + self.entries[:shift]


Maker = Literal["ours", "transformers", "litgpt", "x-transformers"]
MODELS: dict[tuple[Maker, Family], tuple[str, ...]] = {
    ("ours", "mla_moe"): ("MLA + DeepSeekMoE",),
    ("ours", "dense"): ("dense",),
    ("ours", "mixtral"): ("Mixtral-like",),
    ("transformers", "mla_moe"): ("DeepSeek-V3", "DeepSeek-V2"),
    ("transformers", "dense"): ("Llama",),
    ("transformers", "mixtral"): ("Mixtral",),
    ("litgpt", "mla_moe"): ("DeepSeek-V3-like",),
    ("litgpt", "dense"): ("Llama-like",),
    ("litgpt", "mixtral"): ("Mixtral-like",),
    ("x-transformers", "dense"): ("Llama-like",),
}


@dataclass(frozen=True)
class Contender:
    """One contender of a race.

    Args:
        maker: the library
        family: the model family
        model: the library's name for it, one of ``MODELS``
        tuned: with the best settings instead of the defaults (see benchmarks/worker.py)
        compiled: with torch.compile
    """

    maker: Maker
    family: Family
    model: str
    tuned: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name without the settings."""
        return f"{self.maker} {self.model}"

    @property
    def settings(self) -> str:
        """The settings, as text."""
        return ("best settings" if self.tuned else "as it comes") + (", compiled" if self.compiled else "")

    @property
    def label(self) -> str:
        """Unique label within a race."""
        return f"{self.name}, {self.settings}"


def contenders(family: Family, *, compiled: bool = False, older: bool = False) -> list[Contender]:
    """Every implementation of a family, with defaults and with best settings.

    Args:
        compiled: add each with best settings under torch.compile
        older: add models superseded by another of the same library (transformers' DeepSeek-V2)
    """
    found = []
    for (maker, of), models in MODELS.items():
        if of == family:
            for model in models if older else models[:1]:
                found += [Contender(maker, family, model, tuned) for tuned in (True, False)]
                found += [Contender(maker, family, model, True, True)] if compiled else []
    return found


@dataclass(frozen=True)
class Spread:
    """Median, lower and upper quartile, and number of repeated measurements."""

    median: float
    q1: float
    q3: float
    n: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """ours ÷ theirs in every round that has both; None if there is no such round."""
    rounds = sorted(ours.keys() & theirs.keys())
    return spread([ours[r] / theirs[r] for r in rounds]) if rounds else None
