"""``blockwright sweep job DIR N``: one job of a sweep, as a pod, the local runner or a user runs it.

It resumes from the newest checkpoint in the job's own folder. In a pod it also says in the termination message how it
ended, finds its rank, and guards against attempts without progress.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from blockwright.lab.sweep import locks
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.table import FIGURES
from blockwright.registry import REFUSED, ConfigError
from blockwright.registry.folder import read_json
from blockwright.registry.quoting import quoted
from blockwright.training import jobs
from blockwright.training.checkpoints.find import newest
from blockwright.training.checkpoints.places import FOLDER
from blockwright.training.result import RESULTS, Result, record_failure
from blockwright.training.stops import DIVERGED, PREEMPTED, SIGNALS
from blockwright.training.writing import write_json

LOG = "job.log"
PREVIOUS = "results.previous.json"  # of a job's previous attempt
ATTEMPTS = "attempts.json"  # in a job's folder: successive attempts from the same checkpoint
IDLE = 3  # such attempts after which a stop counts as a failure
TAIL = 3  # log lines in a reason
MESSAGE = Path("/dev/termination-log")
LIMIT = 4096  # bytes of a termination message
INDEX = "JOB_COMPLETION_INDEX"  # set in a pod: its node
NAMES_S = 300  # until the names of a job's pods must be known


def command(sweep: Path, plan: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[list[str], Path | None]:
    """The command that runs a job of a plan, and the checkpoint that it resumes from, if any."""
    folder = sweep / str(job["job"])
    more = [f"hydra.run.dir={quoted(folder)}", "auto_resume=false"]  # may be set in a file
    if job.get("after") is not None:
        more.append(f"init_from={quoted(sweep / str(job['after']))}")
    if (checkpoint := newest(folder)) is not None:
        more.append(f"ckpt_path={quoted(checkpoint)}")
    return [sys.executable, *jobs.TRAIN, *plans.job_command(plan, job, more)], checkpoint


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


def run_job(sweep: Path, number: int, overrides: Sequence[str] | None = None) -> int:
    """Run one job.

    Args:
        sweep: its folder
        number: of the job
        overrides: of the job; None for those in the sweep's plan

    Returns:
        the run's exit code: 0, 64 refused, 70 diverged, 75 stopped and resumable, others

    Raises:
        ConfigError: no such job, one that is running, or a folder that cannot hold checkpoints
    """
    node, in_pod = int(os.environ.get(INDEX, 0)), INDEX in os.environ
    sweep = sweep.resolve()
    folder, first = sweep / str(number), node == 0
    plan, job = _planned(sweep, number, overrides)
    result = Result.read(folder)
    if result.status in ("completed", "pruned"):  # a pod that was lost after its run had ended
        print(f"job {number} is {result.status}", flush=True)
        return _reported(result, 0) if first else 0
    if not in_pod and locks.is_taken(folder):
        raise ConfigError("N", number, "is running", f"See blockwright sweep status {sweep}")
    tries = 0
    if first:
        probe(folder)
        set_aside(folder, result)
        tries = _attempts(folder)
    environment = {**os.environ, **_joined(node, tries)}
    arguments, checkpoint = command(sweep, plan, job)
    print(f"job {number} {f'resumes from {checkpoint}' if checkpoint else 'starts'}", flush=True)
    start = (folder / LOG).stat().st_size if (folder / LOG).exists() else 0
    cwd, log = plan.get("cwd") if overrides is None else None, folder / LOG if first else None
    code = _run(arguments, cwd, log, environment)
    if not first:
        return code
    if code == PREEMPTED and tries >= IDLE:
        print(f"error: stopped {tries + 1} times without a newer checkpoint", file=sys.stderr)
        code = 1
    if code != PREEMPTED:
        conclude(folder, code, start, final=not in_pod or code in (REFUSED, DIVERGED))
    result = Result.read(folder)
    if not result.ended:
        result = Result("stopped" if code == PREEMPTED else "failed")
    if code not in (0, PREEMPTED) and not result.reason:
        result = replace(result, reason=why(folder / LOG, start, code))
    return _reported(result, code)


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


def _joined(node: int, tries: int) -> dict[str, str]:
    """In a pod of several: wait for the first pod's name, and back off, which a JobSet does not.

    Returns:
        the variables that give the run its rank; this process keeps none, or what it runs later would be taken for a
        child
    """
    if int(os.environ.get("NNODES", 1)) == 1:
        return {}
    if tries > 1:
        time.sleep(min(10 * 2 ** (tries - 2), 160))
    host, until = os.environ["MASTER_ADDR"], time.monotonic() + NAMES_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            return {"NODE_RANK": str(node)}
        except OSError:
            if time.monotonic() > until:
                rule = f"has no address after {NAMES_S} s"
                remedy = "Check the cluster's DNS and the headless Service of the job"
                raise ConfigError("MASTER_ADDR", host, rule, remedy) from None
            time.sleep(0.5)


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
    before = {s: signal.signal(s, lambda signum, _: process.send_signal(signum)) for s in SIGNALS}
    assert process.stdout is not None
    copying = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
    copying.start()
    try:
        return process.wait()
    finally:
        copying.join(timeout=5)  # a grandchild may hold the pipe
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


def _reported(result: Result, code: int) -> int:
    """Leave the termination message of a pod; returns the exit code, for a signal as a shell does."""
    code = code if code >= 0 else 128 - code
    if INDEX in os.environ:
        try:
            Path(os.environ.get("TERMINATION_MESSAGE", MESSAGE)).write_text(message(result, code))
        except OSError as error:
            print(f"warning: no termination message ({error})", file=sys.stderr)
    return code


def message(result: Result, code: int) -> str:
    """A result within the 4 KiB of a termination message.

    Of too many figures those stay that a sweep may compare, the table's first: they have a direction.
    """
    compared = [name for name, figure in result.figures.items() if figure.better is not None]
    names = [name for name in dict.fromkeys([*FIGURES, *compared, *result.metrics]) if name in result.metrics]
    short = replace(result, steps=None, fit_seconds=None, code=code, reason=result.reason[:1000])
    kept = _with_figures(short, [])
    for count in range(1, len(names) + 1):
        if len((more := _with_figures(short, names[:count])).encode()) > LIMIT:
            break
        kept = more
    return kept


def _with_figures(result: Result, names: Sequence[str]) -> str:
    """A result with some of its figures, as JSON."""
    metrics = {name: result.metrics[name] for name in names}
    figures = {name: result.figures[name] for name in names if name in result.figures}
    return json.dumps(replace(result, metrics=metrics, figures=figures).to_plain())


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
