"""Run an untrusted Python program in a process that can do no harm, and its tests in another that it cannot see."""

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

from blockwright.plugins.alignment.sandbox.boxed import judge, program

SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
START_S = 5.0  # for both processes to start
PATIENCE = 4  # wall-clock time over processor time
LAST_S = 2.0  # for the judge, after the program has ended
NOBODY = "65534"
INSIDE = "/box"  # where a box sees the folder boxed/
ROOT = Path(__file__).parents[len(__name__.split(".")) - 1]
BEGIN = "import sys; sys.path.insert(0, sys.argv[1]); from {} import main; del sys.path[0]; main()"


class BoxError(RuntimeError):
    """The system does not allow the box."""


@dataclass(frozen=True)
class Box:
    """Two processes without network, other processes, environment, or files of the user: for a program, and for its
    tests.

    The judge has the tests, asks the program for values through a pipe, and reports. The program has neither the tests
    nor a handle on the judge: what it does to its own process can only change what it answers.

    bubblewrap takes all files away but Python's and the system's, which are read-only, in namespaces of Linux (users,
    processes, network, mounts); a filter of system calls refuses processes, sockets, signals and files that are memory.
    Only the standard library is there.

    Args:
        seconds: of processor time for each of the two; of wall-clock time four times as much and 5 more
        memory_mb: of the address space of each, in MB
        file_mb: of all files that it writes, in MB
        weaker: without bubblewrap, with the limits and the filter alone: then a program may read and write the user's
            files, read the environment of the process that trains, and, where the system lets processes of a user
            trace each other, change that process, or a judge of another program that is about to begin
    """

    seconds: int
    memory_mb: int
    file_mb: int
    weaker: bool = False

    def passed(self, source: str, tests: Sequence[str], messages: int | None = None) -> int:
        """The number of tests that raise nothing when run on the program.

        Args:
            source: of the program
            tests: Python code; a name that is neither defined in them nor Python's own is the program's
            messages: descriptor of a file for error output of the boxes; None for nowhere

        Raises:
            BoxError: the boxes cannot be made
        """
        key = secrets.token_bytes(32)
        reports = self._reports(source, tests, key, messages)
        if judge.signed(judge.ABSENT, 1, key) in reports:
            raise BoxError("a process in a box did not start")
        return sum(report == judge.signed(judge.PASSED, number, key) for number, report in enumerate(reports, 1))

    def _reports(self, source: str, tests: Sequence[str], key: bytes, messages: int | None) -> list[bytes]:
        """Run the program and its tests; the judge's reports after the first, which says that it is restricted.

        Raises:
            BoxError: the judge does not start
        """
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(open(os.devnull, "wb")).fileno() if messages is None else messages
            questions, answers = (stack.enter_context(_pipe()) for _ in range(2))
            request = {"tests": list(tests), "source": answers.out, "sink": questions.into, "key": key.hex()}
            kept = (answers.out, questions.into)
            judging = stack.enter_context(self._started(judge, request, subprocess.PIPE, errors, kept))
            end = time.monotonic() + PATIENCE * self.seconds + START_S
            reports = judging.stdout.fileno()
            if _read(reports, judge.SIZE, end) != judge.signed(judge.READY, 0, key):
                raise BoxError("a process in a box did not start")
            request = {"program": source, "source": questions.out}
            running = stack.enter_context(self._started(program, request, answers.into, errors, (questions.out,)))
            for pipe in (questions, answers):
                pipe.close()  # so that each sees the other's end
            size = judge.SIZE * len(tests)
            read = _read(reports, size, end)
            if len(read) < size:
                _end(running)
                read += _read(reports, size - len(read), time.monotonic() + LAST_S)
        return [read[at : at + judge.SIZE] for at in range(0, len(read), judge.SIZE)]

    def check(self) -> bool:
        """True if Python runs within the limits.

        Raises:
            BoxError: the boxes cannot be made, with the reason that the system gives
        """
        if not self.weaker and _bubblewrap() is None:
            raise BoxError("bubblewrap is not installed")
        with tempfile.TemporaryFile() as messages:
            try:
                return self.passed("def f(x): return x", ["assert f(1) == 1"], messages.fileno()) == 1
            except BoxError as error:
                messages.seek(0)
                lines = messages.read().decode(errors="replace").strip().splitlines()
                raise BoxError(lines[-1] if lines else str(error)) from None

    @contextlib.contextmanager
    def _started(
        self, role: ModuleType, request: dict[str, Any], out: int, errors: int, kept: tuple[int, ...]
    ) -> Iterator[Any]:
        """A process in a box, which ends with this context."""
        limits = {"seconds": self.seconds, "memory": self.memory_mb * 10**6, "file_bytes": self.file_mb * 10**6}
        with tempfile.TemporaryDirectory(prefix="box-") as folder:
            with tempfile.TemporaryFile() as file:
                file.write(json.dumps({**request, **limits, "weaker": self.weaker}).encode())
                file.seek(0)
                process = subprocess.Popen(
                    [*([] if self.weaker else _walls()), *_python(role, ROOT if self.weaker else Path(INSIDE))],
                    stdin=file,
                    stdout=out,
                    stderr=errors,
                    cwd=folder,
                    env={key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ},
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
    """The next ``size`` bytes of a pipe, or fewer if it closes or the time ``end`` passes before."""
    read, poll = b"", select.poll()
    poll.register(pipe, select.POLLIN)
    while len(read) < size and (left := end - time.monotonic()) > 0:
        if not poll.poll(1000 * left) or not (more := os.read(pipe, size - len(read))):
            break
        read += more
    return read


class _Pipe:
    """The two ends of a pipe."""

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


def _python(role: ModuleType, root: Path) -> list[str]:
    interpreter = os.path.realpath(sys.executable)
    return [interpreter, "-I", "-S", "-c", BEGIN.format(role.__name__), str(root)]


def _walls() -> list[str]:
    """The command of bubblewrap, up to the one that it runs. The capability is for mounting /tmp, and is given up."""
    code = Path(judge.__file__).parent
    options = ["--die-with-parent", "--new-session", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
    options += [f"--unshare-{what}" for what in ("pid", "net", "ipc", "uts")]
    options += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for path in readable():
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    options += ["--ro-bind", str(code), f"{INSIDE}/{code.relative_to(ROOT)}", "--dir", "/tmp"]
    options += ["--dev-bind", os.devnull, os.devnull, "--remount-ro", "/", "--chdir", "/tmp"]
    return [_bubblewrap() or "bwrap", *options, "--"]


def readable() -> list[str]:
    """The folders of Python and of the system's libraries, none inside another."""
    python = str(Path(os.path.realpath(sys.executable)).parent.parent)
    folders = [path for path in dict.fromkeys([*SYSTEM, sys.base_prefix, python]) if os.path.lexists(path)]
    return [path for path in folders if not any(path.startswith(f"{other}/") for other in folders)]
