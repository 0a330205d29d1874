"""Processes of a sweep's jobs, each forked from one that has imported what trains.

Importing torch, Lightning and this project takes six seconds of a core, a sixth of a job that trains for half a minute.
A fork has them at once. It is otherwise as ``python ARGUMENTS`` in a process of its own: its output, exit code and
signals. Run as a program, ``-m blockwright.lab.sweep.forking SOCKET MODULE …``, this is the process that forks.

A fork of a process that has spoken to the driver of a GPU cannot use it, and imports may do that. So on a machine with
one, each job is a new interpreter.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Protocol

from blockwright.registry import ConfigError
from blockwright.training.result import SIGNALS

IMPORTED = ("blockwright.training.entry.main", "blockwright.training.entry.cli", "torch._dynamo")
LARGEST = 2**17  # bytes of a message; a socket takes more without being set


class Process(Protocol):
    """A job's process, a fork or a new interpreter."""

    returncode: int | Any

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Processes:
    """Starts the processes of jobs. A context, at whose end no more are started; those that run are left to run.

    Args:
        cwd: folder to run in; None for this process's
        environment: of all
        lock: a file that a job keeps open, so that its lock outlives this process
    """

    def __init__(self, cwd: str | None, environment: Mapping[str, str], lock: int) -> None:
        self.cwd, self.environment, self.lock = cwd, environment, lock
        self._parent: _Parent | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._parent is not None:
            self._parent.close()

    def start(self, arguments: Sequence[str], log: IO[bytes]) -> Process:
        """Start ``python ARGUMENTS``, where the first is ``-m`` or a file.

        Args:
            arguments: of Python
            log: to append its output to

        Raises:
            ConfigError: the process that forks has ended
        """
        if self._parent is None and sys.platform == "linux":
            self._parent = _Parent(self.cwd, self.environment)
        if self._parent is not None and self._parent.takes(arguments):
            return _Fork(self._parent, self._parent.ask({"run": list(arguments)}, log.fileno(), self.lock))
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=self.cwd,
            env=self.environment,
            pass_fds=(self.lock,),
        )


class _Parent:
    """The process that forks, as seen from outside; arguments as of ``Processes``."""

    def __init__(self, cwd: str | None, environment: Mapping[str, str]) -> None:
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(its.fileno()), *IMPORTED],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what cannot be imported, a job says in its log
                stderr=subprocess.DEVNULL,
                cwd=cwd,
                env=environment,
                pass_fds=(its.fileno(),),
            )
        try:
            self._can = bool(self.ask({}))
        except ConfigError:  # its imports ended it; what is wrong with them, a new interpreter says in a job's log
            self._can = False

    def takes(self, arguments: Sequence[str]) -> bool:
        """Whether a fork can do all that a new interpreter can, and its arguments fit into a message."""
        return self._can and len(json.dumps(list(arguments))) < LARGEST - 100

    def ask(self, request: Mapping[str, Any], *files: int) -> Any:
        """Ask, and wait for the answer.

        Args:
            request: ``run``, Python's arguments; or ``poll``, a fork's process number
            files: of a fork: where it writes, and what it keeps open
        """
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            answer = self._socket.recv(LARGEST)
        except ConnectionError:
            answer = b""
        if not answer:
            rule = "the process that they are forked from has ended (killed for memory?)"
            raise ConfigError("jobs", "running", rule, "They save and stop: resume the sweep")
        return json.loads(answer)

    def close(self) -> None:
        """End it, not its forks."""
        self._socket.close()
        self._process.wait()


class _Fork:
    """A fork; methods as of ``subprocess.Popen``."""

    def __init__(self, parent: _Parent, pid: int) -> None:
        self._parent, self.pid = parent, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._parent.ask({"poll": self.pid})
        return self.returncode

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, signum: int) -> None:
        if self.returncode is None:  # or its number may be another's by now
            with suppress(ProcessLookupError):  # its parent is lost
                os.kill(self.pid, signum)


def _serve(asked: socket.socket) -> tuple[list[str], list[int]] | None:
    """Fork for whatever is asked. In the fork: Python's arguments and its files; None at the end."""
    while True:
        message, files, _, _ = socket.recv_fds(asked, LARGEST, 2)
        if not message:
            return None
        request = json.loads(message)
        torch = sys.modules.get("torch")
        answer: int | None = torch is None or not torch.accelerator.is_available()
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif "run" in request:
            answer = os.fork()
            if not answer:
                return request["run"], files
        for file in files:
            os.close(file)
        asked.send(json.dumps(answer).encode())


def _become(arguments: Sequence[str], log: int, lock: int) -> None:
    """Be ``python ARGUMENTS``, with the lock kept open."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # those since the fork arrive now
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    run(arguments)


def run(arguments: Sequence[str]) -> None:
    """Run ``python ARGUMENTS`` here, where the first is ``-m`` or a file."""
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def end(program: Callable[[], object]) -> NoReturn:
    """Run a program and end with it, as an interpreter does.

    But for taking apart every module, which would copy all of the memory first.
    """
    code: Any = 0
    try:
        program()
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Fork until the other end of the socket is closed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a terminal sends them to all of its processes
    asked, modules = socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]
    for name in modules:
        with suppress(Exception):  # a job that needs it fails, and says so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what a collection would touch, every fork would copy
    job = _serve(asked)
    asked.close()
    end(partial(_become, job[0], *job[1]) if job else lambda: None)


if __name__ == "__main__":
    main()
