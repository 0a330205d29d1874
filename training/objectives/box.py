"""Run an untrusted Python program in a process that can do no harm, and its tests in another, which it cannot see."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from blockwright.training.objectives.boxed import judge, program

SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
START_S = 5.0  # for both to start
PATIENCE = 4  # wall-clock time over processor time
LAST_S = 2.0  # for the judge, once the program's time is over
NOBODY = "65534"
INSIDE = "/box"  # where a box sees our own files
ROOT = Path(__file__).parents[len(__name__.split(".")) - 1]
BEGIN = "import sys; sys.path.insert(0, sys.argv[1]); from {} import main; del sys.path[0]; main()"


class BoxError(RuntimeError):
    """The system does not allow the box."""


@dataclass(frozen=True)
class Box:
    """Two processes without network, other processes, environment, or files of the user: for a program, and for its
    tests.

    What reports is the judge, which has the tests and asks the program for values through a pipe. The program has
    neither the tests, nor a handle on the judge: what it does to its own process can only change what it answers.

    bubblewrap takes all files away but Python's and the system's, which are read-only, in namespaces of Linux (users,
    processes, network, mounts); a filter of system calls refuses processes, sockets, signals and files that are memory.
    Only the standard library is there.

    Args:
        seconds: of processor time for each of the two; of wall-clock time four times as much and 5 more
        memory_mb: of the address space of each, in MB
        file_mb: of all files that it writes, in MB
        weaker: without bubblewrap, with the limits and the filter alone: then a program may read and write the user's
            files, read the environment of the process that trains, and, where the system lets processes of a user
            trace each other, change that process
    """

    seconds: int
    memory_mb: int
    file_mb: int
    weaker: bool = False

    def passed(self, source: str, tests: Sequence[str], said: int | None = None) -> int:
        """How many tests raise nothing when run on the program: 0 to their number.

        Args:
            source: of the program
            tests: Python code; a name that is neither defined in them nor Python's own is the program's
            said: descriptor for what the boxes say, for messages; None for nowhere

        Raises:
            BoxError: the boxes cannot be made
        """
        with contextlib.ExitStack() as open_things:
            errors = open_things.enter_context(open(os.devnull, "wb")).fileno() if said is None else said
            asked, answers = (open_things.enter_context(_pipe()) for _ in range(2))
            key = secrets.token_bytes(32)
            given = {"tests": list(tests), "source": answers.out, "sink": asked.into, "key": key.hex()}
            judging = open_things.enter_context(
                self._started(judge, given, subprocess.PIPE, errors, (answers.out, asked.into))
            )
            end = time.monotonic() + PATIENCE * self.seconds + START_S
            report = judging.stdout.fileno()
            if _read(report, judge.SIZE, end) != judge.signed(judge.READY, 0, key):
                raise BoxError("a process in a box did not start")
            given = {"program": source, "source": asked.out}
            running = open_things.enter_context(self._started(program, given, answers.into, errors, (asked.out,)))
            for pipe in (asked, answers):
                pipe.close()  # so that each sees the other's end
            size = judge.SIZE * len(tests)
            found = _read(report, size, end)
            if len(found) < size:
                _end(running)
                found += _read(report, size - len(found), time.monotonic() + LAST_S)
        events = [found[at : at + judge.SIZE] for at in range(0, len(found), judge.SIZE)]
        if judge.signed(judge.ABSENT, 1, key) in events:
            raise BoxError("a process in a box did not start")
        return sum(event == judge.signed(judge.PASSED, number, key) for number, event in enumerate(events, 1))

    def check(self) -> bool:
        """Whether Python runs within the limits.

        Raises:
            BoxError: the boxes cannot be made, with the reason that the system gives
        """
        if not self.weaker and _bubblewrap() is None:
            raise BoxError("bubblewrap is not installed")
        with tempfile.TemporaryFile() as said:
            try:
                return self.passed("def f(x): return x", ["assert f(1) == 1"], said.fileno()) == 1
            except BoxError as error:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                raise BoxError(lines[-1] if lines else str(error)) from None

    @contextlib.contextmanager
    def _started(
        self, role: ModuleType, given: dict[str, Any], out: int, errors: int, kept: tuple[int, ...]
    ) -> Iterator[Any]:
        """A process in a box, which ends with this context."""
        limits = {"seconds": self.seconds, "memory": self.memory_mb * 10**6, "file_bytes": self.file_mb * 10**6}
        with tempfile.TemporaryDirectory(prefix="box-") as folder:
            with tempfile.TemporaryFile() as request:
                request.write(json.dumps({**given, **limits, "weaker": self.weaker}).encode())
                request.seek(0)
                process = subprocess.Popen(
                    [*([] if self.weaker else _walls()), *_python(role, ROOT if self.weaker else Path(INSIDE))],
                    stdin=request,
                    stdout=out,
                    stderr=errors,
                    cwd=folder,
                    env=_environment(),
                    start_new_session=True,
                    pass_fds=kept,
                )
            try:
                yield process
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a box; its first process takes all others with it."""
    if process.returncode is None:  # else its number may be that of another process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    process.wait()


def _read(pipe: int, size: int, end: float) -> bytes:
    """So many bytes, or those that came before a time or the pipe's end."""
    found, readable = b"", select.poll()
    readable.register(pipe, select.POLLIN)
    while len(found) < size and (left := end - time.monotonic()) > 0:
        if not readable.poll(1000 * left) or not (more := os.read(pipe, size - len(found))):
            break
        found += more
    return found


class _Pipe:
    """A pipe's two ends."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()
        self.is_open = True

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            os.close(self.out)
            os.close(self.into)


@contextlib.contextmanager
def _pipe() -> Iterator[_Pipe]:
    pipe = _Pipe()
    try:
        yield pipe
    finally:
        pipe.close()


def _bubblewrap() -> str | None:
    return shutil.which("bwrap")


def _environment() -> dict[str, str]:
    return {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}  # Python's own libraries


def _python(role: ModuleType, root: Path) -> list[str]:
    interpreter = os.path.realpath(sys.executable)
    return [interpreter, "-I", "-S", "-c", BEGIN.format(role.__name__), str(root)]


def _walls() -> list[str]:
    """The command of bubblewrap, up to the one that it runs. The capability is for mounting /tmp, and is given up."""
    own = Path(judge.__file__).parent
    options = ["--die-with-parent", "--new-session", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
    options += [f"--unshare-{what}" for what in ("pid", "net", "ipc", "uts")]
    options += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for path in readable():
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    options += ["--ro-bind", str(own), f"{INSIDE}/{own.relative_to(ROOT)}", "--dir", "/tmp"]
    options += ["--dev-bind", os.devnull, os.devnull, "--remount-ro", "/", "--chdir", "/tmp"]
    return [_bubblewrap() or "bwrap", *options, "--"]


def readable() -> list[str]:
    """The folders of Python and of the system's libraries, none inside another."""
    wanted = dict.fromkeys([*SYSTEM, sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parent.parent)])
    there = [path for path in wanted if os.path.lexists(path)]
    return [path for path in there if not any(path.startswith(f"{other}/") for other in there)]
