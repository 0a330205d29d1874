"""Run the unfinished jobs of a plan, which may grow: on its launcher, else each in a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockwright.lab.sweep import launcher, seams
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.forking import Process, Processes
from blockwright.lab.sweep.job import LOG, READY, WAITS, command, conclude, fail_after, state_of
from blockwright.lab.sweep.table import Display, exit_code, summarise
from blockwright.registry import REFUSED, ConfigError
from blockwright.training.claims import take_sweep
from blockwright.training.result import DIVERGED, PREEMPTED, SIGNALS, Result

LAUNCHED = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_plan(directory: Path, workers: int | None = None, jobs: Collection[int] | None = None) -> int:
    """Run the unfinished jobs of a plan, then those that follow from their results; print the table, and conclude.

    A job with a good checkpoint resumes from it. One that starts from the weights of another (``after``) waits for it,
    and fails if that one has. One that fails or diverges becomes a row with its reason, and the
    others continue. SIGINT, SIGTERM and SIGUSR1 are forwarded to the jobs, which save and stop; a second SIGINT kills.

    Args:
        directory: of the sweep, with its ``plan.json``
        workers: parallel processes; None: as in the plan, else 1. Of no effect on a launcher
        jobs: numbers of the jobs to run if unfinished, and no others; None: all, and those that follow

    Returns:
        0 when all have ended; 1 if every one has failed or diverged; 75 when stopped by a signal

    Raises:
        ConfigError: no sweep, a search, a running sweep, no such job, or nothing to report in the end
    """
    directory = directory.resolve()
    plan = plans.read(directory)
    if "jobs" not in plan:
        rule, remedy = "is a search, whose jobs its sampler chooses", f"Write blockwright sweep resume {directory}"
        raise ConfigError("DIR", str(directory), rule, remedy)
    workers = plan.get("workers") or 1 if workers is None else workers
    check_can_run(directory, plan, workers)
    code = launcher.run(directory, plan, jobs) if launcher.KEY in plan else _run_here(directory, plan, workers, jobs)
    if jobs is None and not code:
        seams.conclude(directory, plans.read(directory))
    return code


def _run_here(directory: Path, plan: Mapping[str, Any], workers: int, jobs: Collection[int] | None) -> int:
    """Run a plan in processes of this one; returns the exit code."""
    lock = take_sweep(directory)
    try:
        with _noted() as signals, Processes(plan.get("cwd"), environment(workers), lock) as processes:
            _run_stage(directory, plan, workers, processes, jobs, signals)
            while jobs is None and not signals and plans.grow(directory, plan):
                plan = plans.read(directory)
                check_can_run(directory, plan, workers)
                _run_stage(directory, plan, workers, processes, jobs, signals)
        code = exit_code(summarise(directory))
    finally:
        os.close(lock)
    if signals:
        name = signal.Signals(signals[0]).name
        print(f"stopped by {name}. Resume with: {resume_command(directory)}", flush=True)
        return PREEMPTED
    return code


def _run_stage(
    directory: Path,
    plan: Mapping[str, Any],
    workers: int,
    processes: Processes,
    jobs: Collection[int] | None,
    signals: list[int],
) -> None:
    """Run the jobs of a plan that have not ended."""
    waiting = [j for j in plan["jobs"] if jobs is None or j["job"] in jobs]
    waiting = [j for j in waiting if not Result.read(directory / str(j["job"])).ended]
    with Display(directory, plan, workers) as display:
        display.say(f"{directory}: {len(waiting)} of {len(plan['jobs'])} jobs to run, {workers} at a time")
        _Runner(directory, plan, workers, processes, display).run(waiting, signals)


def check_can_run(directory: Path, plan: Mapping[str, Any], workers: int) -> None:
    """Check before anything changes.

    Raises:
        ConfigError: no workers, the sweep's working directory is missing, a file is in place of a job's folder, or a
            package is missing that reports the sweep
    """
    if workers < 1:
        raise ConfigError("workers", workers, "is the number of parallel jobs", "Write 1 or more")
    if not Path(plan.get("cwd", ".")).is_dir():
        rule = "was the sweep's working directory, the base of relative paths"
        raise ConfigError("cwd", plan["cwd"], rule, f"Create it again, or correct cwd in {directory / plans.PLAN}")
    for job in plan.get("jobs") or []:
        if (folder := directory / str(job["job"])).exists() and not folder.is_dir():
            raise ConfigError("DIR", str(folder), "is a file in place of a job's folder", "Move it away")
    for ending in seams.endings_of(plan):
        ending.need_packages()


def resume_command(directory: Path) -> str:
    """The command that resumes a sweep."""
    return shlex.join(["blockwright", "sweep", "resume", str(directory)])


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Record signals instead of handling them."""
    noted: list[int] = []
    before = {s: signal.signal(s, lambda signum, _: noted.append(signum)) for s in SIGNALS}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclass(frozen=True)
class _Running:
    job: Mapping[str, Any]
    process: Process
    since: float
    log_start: int  # offset of this attempt in its log


class _Runner:
    def __init__(
        self, directory: Path, plan: Mapping[str, Any], workers: int, processes: Processes, display: Display
    ) -> None:
        self.directory, self.plan, self.workers = directory, plan, workers
        self.processes, self.display = processes, display
        self.running: list[_Running] = []
        listed = [set(job["overrides"]) for job in plan["jobs"]]
        self._common = set.intersection(*listed) if len(listed) > 1 else set()

    def run(self, waiting: list[dict[str, Any]], signals: list[int]) -> None:
        heard = 0
        try:
            while self.running or (waiting and not signals):
                while len(self.running) < self.workers and not signals and (job := self._next(waiting)):
                    self.running.append(self._start(job))
                if len(signals) > heard:
                    self._hand_on(first=heard == 0, again=signals[heard:].count(signal.SIGINT))
                    heard = len(signals)
                for one in [r for r in self.running if r.process.poll() is not None]:
                    self.running.remove(one)
                    self._end(one, stopping=bool(signals))
                self.display.refresh([(r.job["job"], self._distinct(r.job), r.since) for r in self.running])
                time.sleep(0.05)
        finally:
            for left in self.running:  # only if this loop has failed
                left.process.terminate()

    def _next(self, waiting: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Take the first job that can start off the list; None if all others wait for jobs that run."""
        for job in list(waiting):
            start, state = job.get("after"), state_of(self.directory, job)
            if state == WAITS and start in [j["job"] for j in waiting] + [r.job["job"] for r in self.running]:
                continue
            waiting.remove(job)
            if state == READY:
                return job
            if state == WAITS:
                self.display.say(f"job {job['job']} is left: job {start}, whose weights it starts from, has not run")
                continue
            fail_after(self.directory, job)
            self.display.ended(job["job"])
        return None

    def _start(self, job: Mapping[str, Any]) -> _Running:
        folder = self.directory / str(job["job"])
        folder.mkdir(parents=True, exist_ok=True)
        arguments, checkpoint = command(self.directory, self.plan, job)
        with (folder / LOG).open("ab") as log:
            start, since = log.tell(), time.monotonic()
            process = self.processes.start(arguments, log)
        how = "resumes" if checkpoint else "starts"
        self.display.say(f"job {job['job']} {how}: {self._distinct(job)}")
        return _Running(job, process, since, start)

    def _distinct(self, job: Mapping[str, Any]) -> str:
        return plans.name_of(job) or " ".join(o for o in job["overrides"] if o not in self._common)

    def _hand_on(self, first: bool, again: int) -> None:
        if first:
            self.display.say(f"stopping: {len(self.running)} jobs save and end")
        for one in self.running:
            if first:
                one.process.terminate()
            elif again:
                one.process.kill()

    def _end(self, one: _Running, stopping: bool) -> None:
        number, code = one.job["job"], one.process.returncode
        folder = self.directory / str(number)
        if code == PREEMPTED or (stopping and code not in (0, DIVERGED, REFUSED)):
            self.display.say(f"job {number} stopped; it can be resumed")
            return
        conclude(folder, code, one.log_start)
        replace(Result.read(folder), wall_seconds=round(time.monotonic() - one.since, 3)).write(folder)
        self.display.ended(number)


def environment(workers: int) -> dict[str, str]:
    """A job's environment: this process's, with its share of the cores unless the user has set thread numbers."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    clean.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    return clean
