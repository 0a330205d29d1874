"""One job of a sweep, as a host, the local runner or ``blockwright sweep job DIR N`` runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from blockwright.lab.sweep import plan as plans
from blockwright.registry import ConfigError
from blockwright.registry.command import quoted
from blockwright.registry.folder import read_json, write_json
from blockwright.training import claims, jobs
from blockwright.training.checkpoints.find import milestone, newest
from blockwright.training.configuration.run import FOLDER
from blockwright.training.result import DIVERGED, PREEMPTED, RESULTS, SIGNALS, Result, record_failure

LOG = "job.log"
PREVIOUS = "results.previous.json"  # of a job's previous attempt
ATTEMPTS = "attempts.json"  # in a job's folder: successive attempts from the same checkpoint
IDLE = 3  # such attempts after which a stop counts as a failure
TAIL = 3  # log lines in a reason
READY, WAITS, LOST = "ready", "waits", "lost"


def command(sweep: Path, plan: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[list[str], Path | None]:
    """Python's arguments that run a job of a plan, and the checkpoint that it resumes from, if any."""
    start, checkpoint = origin(sweep, job)
    more = [f"hydra.run.dir={quoted(sweep / str(job['job']))}", *start]
    return [*jobs.TRAIN, *plans.job_command(plan, job, more)], checkpoint


def origin(sweep: Path, job: Mapping[str, Any]) -> tuple[list[str], Path | None]:
    """The overrides that give a job its start, and the checkpoint that it resumes from, if any."""
    more, checkpoint = ["auto_resume=false"], newest(sweep / str(job["job"]))  # auto_resume may be set in a file
    if job.get("after") is not None:
        start = sweep / str(job["after"])
        if "from_step" not in job:
            more.append(f"init_from={quoted(start)}")
        elif checkpoint is None:
            checkpoint = milestone(start / FOLDER, job["from_step"])
    if checkpoint is not None:
        more.append(f"ckpt_path={quoted(checkpoint)}")
    return more, checkpoint


def state_of(sweep: Path, job: Mapping[str, Any]) -> str:
    """Whether a job that has not run is ``READY``, ``WAITS`` for the job whose weights it starts from, or is ``LOST``.

    One whose start has failed is lost.
    """
    if job.get("after") is None:
        return READY
    start = Result.read(sweep / str(job["after"]))
    return READY if start.status == "completed" else LOST if start.ended else WAITS


def fail_after(sweep: Path, job: Mapping[str, Any]) -> None:
    """Record a lost job."""
    record_failure(sweep / str(job["job"]), f"job {job['after']}, whose weights it starts from, has failed")


def conclude(folder: Path, code: int, start: int, final: bool = True) -> None:
    """Record how a job ended, unless its run has.

    Args:
        folder: of the job
        code: its exit code, negative for a signal
        start: offset in its log where this attempt begins
        final: whether no further attempt follows
    """
    if code == 0:
        if not Result.read(folder).ended:
            Result("completed").write(folder)
    elif final:
        record_failure(folder, why(folder / LOG, start, code), "diverged" if code == DIVERGED else "failed")


class Attempt:
    """One attempt at a job of a sweep; it resumes from the newest checkpoint in the job's own folder.

    Args:
        sweep: its folder
        number: of the job
        overrides: of the job; None for those in the sweep's plan
        start: ``after`` and ``from_step`` of a job with overrides, as in a plan

    Raises:
        ConfigError: no such job
    """

    def __init__(
        self, sweep: Path, number: int, overrides: Sequence[str] | None = None, start: Mapping[str, int] | None = None
    ) -> None:
        self.sweep, self.number = sweep.resolve(), number
        self.folder = self.sweep / str(number)
        self.plan, self.job = _planned(self.sweep, number, overrides)
        self.job |= start or {}
        self.cwd = self.plan.get("cwd") if overrides is None else None
        self.tries = self.start = 0

    def is_done(self) -> bool:
        """Whether the job has ended well, so that nothing is left to do."""
        status = Result.read(self.folder).status
        if status in ("completed", "pruned"):
            print(f"job {self.number} is {status}", flush=True)
        return status in ("completed", "pruned")

    def make_way(self) -> None:
        """Prepare the folder, and count the attempts before this one that began from the same checkpoint.

        Raises:
            ConfigError: a folder that cannot hold checkpoints
        """
        probe(self.folder)
        set_aside(self.folder, Result.read(self.folder))
        self.tries = _attempts(self.folder)

    def run(self, more: Mapping[str, str], logged: bool = True) -> int:
        """Run the training.

        Args:
            more: environment variables
            logged: whether its output goes to the job's log, too

        Returns:
            its exit code: 0, 64 refused, 70 diverged, 75 stopped and resumable, others; negative for a signal
        """
        arguments, checkpoint = command(self.sweep, self.plan, self.job)
        print(f"job {self.number} {f'resumes from {checkpoint}' if checkpoint else 'starts'}", flush=True)
        log = self.folder / LOG
        self.start = log.stat().st_size if log.exists() else 0
        return _run([sys.executable, *arguments], self.cwd, log if logged else None, {**os.environ, **more})

    def conclude(self, code: int, final: Collection[int] | None = None) -> tuple[int, Result]:
        """Record how the job ended.

        Args:
            code: of ``run``
            final: the codes of failure after which no other attempt follows; None for all

        Returns:
            the exit code, for a signal as a shell has it, 1 after too many stops without progress; and the result
        """
        if code == PREEMPTED and self.tries >= IDLE:
            print(f"error: stopped {self.tries + 1} times without a newer checkpoint", file=sys.stderr)
            code = 1
        if code != PREEMPTED:
            conclude(self.folder, code, self.start, final is None or code in final)
        result = Result.read(self.folder)
        if not result.ended:
            result = Result("stopped" if code == PREEMPTED else "failed")
        if code not in (0, PREEMPTED) and not result.reason:
            result = replace(result, reason=why(self.folder / LOG, self.start, code))
        return code if code >= 0 else 128 - code, result


def run_job(sweep: Path, number: int, overrides: Sequence[str] | None = None) -> int:
    """Run one job on this machine; arguments and exit code as of ``Attempt``.

    Raises:
        ConfigError: no such job, one that is running, or a folder that cannot hold checkpoints
    """
    attempt = Attempt(sweep, number, overrides)
    if attempt.is_done():
        return 0
    if claims.is_taken(attempt.folder):
        raise ConfigError("N", number, "is running", f"See blockwright sweep status {attempt.sweep}")
    attempt.make_way()
    return attempt.conclude(attempt.run({}))[0]


def _planned(sweep: Path, number: int, overrides: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    if overrides is not None:
        return {}, {"job": number, "overrides": list(overrides)}
    plan = plans.read(sweep)
    for job in plan.get("jobs") or []:
        if job["job"] == number:
            return plan, job
    raise ConfigError(
        "N", number, "is not in the sweep's plan", "See blockwright sweep status DIR; or add -- OVERRIDE …"
    )


def probe(folder: Path) -> None:
    """Check that a folder can hold checkpoints: write, fsync, rename, delete.

    Raises:
        ConfigError: one of these fails, as on object storage mounted as a file system
    """
    step, draft, file = "made", folder / f".probe.{os.getpid()}", folder / f".probe.{os.getpid()}.done"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        step = "written"
        with draft.open("wb") as opened:
            opened.write(b"probe")
            opened.flush()
            step = "flushed to storage (fsync)"
            os.fsync(opened.fileno())
        step = "renamed, which makes a checkpoint complete"
        draft.replace(file)
        step = "deleted"
        file.unlink()
    except OSError as error:
        rule = f"a file here cannot be {step} ({error.strerror})"
        remedy = "Name a writable folder on NFS, Filestore, EFS, FSx or CephFS; object storage cannot hold checkpoints"
        raise ConfigError("DIR", str(folder), rule, remedy) from None


def set_aside(job: Path, result: Result) -> str:
    """Make way for another attempt of a job that failed: its results, and its checkpoints if it diverged.

    Returns:
        where its checkpoints are, as a clause; empty if they were not moved
    """
    usual, kept = job / FOLDER, ""
    if result.status == "diverged" and usual.exists():  # from its checkpoint it would diverge again
        moved = usual.resolve().with_name(f"{usual.resolve().name}.diverged.{time.time_ns()}")  # unlike earlier ones
        usual.resolve().rename(moved)
        if usual.is_symlink():
            usual.unlink()
        kept = f" (kept: {moved})"
    if (file := job / RESULTS).exists():
        file.replace(job / PREVIOUS)
    return kept


def _attempts(folder: Path) -> int:
    """Count this attempt; returns how many before it began from the same checkpoint."""
    found = newest(folder)
    begun = "" if found is None else f"{found.name} {found.stat().st_mtime_ns}"
    try:
        before = read_json(folder, ATTEMPTS)
    except ConfigError:
        before = {}
    tries = before.get("tries", 0) + 1 if before.get("from") == begun else 0
    write_json(folder / ATTEMPTS, {"from": begun, "tries": tries})
    return tries


def _run(arguments: Sequence[str], cwd: str | None, log: Path | None, environment: Mapping[str, str]) -> int:
    """Run a command, its output here and in its log, and signals forwarded."""
    file = (log or Path(os.devnull)).open("ab", buffering=0)  # closed by the copying, which may outlive this
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=environment,
    )
    assert process.stdout is not None
    copying = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
    with forwarding(process):
        copying.start()
        code = process.wait()
        copying.join(timeout=5)  # a grandchild may hold the pipe
    return code


@contextmanager
def forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward the signals that ask this process to stop to another one."""
    before = {s: signal.signal(s, lambda signum, _: process.send_signal(signum)) for s in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _copy(output: IO[bytes], log: IO[bytes]) -> None:
    """Copy until the end, whatever becomes of the copies: a job whose output nothing reads would wait for ever."""
    with log:
        copies: list[Any] = [log, sys.stdout.buffer]
        while chunk := os.read(output.fileno(), 1 << 16):
            for copy in list(copies):
                try:
                    copy.write(chunk)
                    copy.flush()
                except OSError as error:
                    copies.remove(copy)
                    print(f"warning: the job's output is no longer written to {copy.name} ({error})", file=sys.stderr)


def why(log: Path, start: int, code: int) -> str:
    """The reason of a failed job: its error, else the last lines of its log.

    Args:
        log: its log
        start: offset in the log where this attempt begins, in bytes
        code: its exit code, negative for a signal
    """
    with log.open("rb") as file:
        file.seek(start)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    if code < 0:
        signalled = f"killed by {signal.Signals(-code).name}"
        return f"{signalled} (out of memory?)" if -code == signal.SIGKILL else signalled
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        error, *more = (line.strip() for line in lines[errors[-1] : errors[-1] + TAIL])
        parts = [line.partition(":")[2].strip() for line in more if line.startswith(("rule:", "remedy:"))]
        return ": ".join([error.removeprefix("error: "), ". ".join(parts)]) if parts else error.removeprefix("error: ")
    if any(line.startswith("Traceback") for line in lines):
        last = max(i for i, line in enumerate(lines) if line.startswith("Traceback"))
        raised = [line for line in lines[last + 1 :] if not line.startswith(" ")]
        return "\n".join(raised[:TAIL]) or lines[-1]
    return "\n".join(lines[-TAIL:]) or f"exit code {code}, without output"
