"""Run an untrusted Python program in a process that can do no harm."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INSIDE = Path(__file__).with_name("boxed.py")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
START_S = 5.0  # for Python to start
ANSWER = 1000  # bytes that are read of it


class BoxError(RuntimeError):
    """The system does not allow the box."""


@dataclass(frozen=True)
class Box:
    """A process without network, other processes, environment, or files of the user.

    Namespaces of Linux (users, processes, network, mounts) take all files away but Python's and the system's, which are
    read-only; a filter of system calls refuses processes, sockets and signals. Only the standard library is there.

    Args:
        seconds: of processor time; four times as long and 5 seconds more of wall-clock time
        memory_mb: of its address space, in MB
        file_mb: of all files that it writes, in MB
        weaker: where namespaces are not allowed, run it with the limits and the filter alone: then it may read and
            write the user's files
    """

    seconds: int
    memory_mb: int
    file_mb: int
    weaker: bool = False

    def passed(self, program: str, tests: Sequence[str]) -> int:
        """How many tests raise nothing when run after the program; 0 if that does not end well.

        Raises:
            BoxError: the box cannot be made
        """
        word = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="box-") as folder, tempfile.TemporaryFile() as request:
            given = {
                "word": word,
                "program": program,
                "tests": list(tests),
                "folder": folder,
                "readable": readable(),
                "weaker": self.weaker,
                "seconds": self.seconds,
                "memory": self.memory_mb * 10**6,
                "file_bytes": self.file_mb * 10**6,
            }
            request.write(json.dumps(given).encode())
            request.seek(0)
            answer = self._answer(folder, request)
        said, _, rest = answer.partition(" ")
        if said != word:
            return 0
        if rest.startswith("broken"):
            raise BoxError(rest.removeprefix("broken "))
        return int(rest.removeprefix("ok "))

    def _answer(self, folder: str, request: object) -> str:
        """What the inside writes first; its process and all of its own are killed then."""
        kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}  # Python's own libraries
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(INSIDE)],
            stdin=request,  # type: ignore[call-overload]
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=kept,
            start_new_session=True,
        )
        try:
            return self._read(process.stdout.fileno())
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()

    def _read(self, pipe: int) -> str:
        end, found = time.monotonic() + 4 * self.seconds + START_S, b""
        while (left := end - time.monotonic()) > 0 and len(found) < ANSWER:
            if not select.select([pipe], [], [], left)[0]:
                break
            if not (more := os.read(pipe, ANSWER)):
                break
            found += more
        return found.decode(errors="replace")


def readable() -> list[str]:
    """The folders of Python and of the system's libraries, none inside another."""
    wanted = dict.fromkeys([*SYSTEM, sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parent.parent)])
    there = [path for path in wanted if os.path.lexists(path)]
    return [path for path in there if not any(path.startswith(f"{other}/") for other in there)]
