"""A process that answers questions one at a time: for work that may not end, or not soon, beside other work."""

from __future__ import annotations

import atexit
import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Answer = Callable[[Any], dict[str, Any]]

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {0} as a; a.work(*sys.argv[2:])"
_SIZE = 8  # bytes of the length before each message
_ALONE = 2.0  # seconds after all of its time is over in which an unended process ends itself


class AnswerError(Exception):
    """No answer: it was late or too long, or its process has ended."""


class StartError(AnswerError):
    """No answer, whatever the question: the process has not started yet, or cannot."""


class Answering:
    """Answers in a process of its own, which is started when it is first needed.

    It imports the module that answers, and nothing else of this program. It ends where an answer takes too much
    computing, even in compiled code, and is started again for the next question; while it starts, it is left alone. The
    time of its processor is counted, of which other work on the machine takes nothing; the time that passes has a limit
    of its own, for a process that waits, or that a question has taken over. Questions wait for each other: any thread
    may ask; a fork of this process starts another. Both sides send JSON, since an answer of a process that a question
    has taken over must do nothing here.

    Args:
        prepare: ``module:function``, called in the process with ``arguments``; returns what answers
        arguments: texts
        seconds: of computing for an answer, CPU time
        within: seconds that may pass until it is there
        start: seconds that a question waits for a process that is starting
        longest: bytes of an answer at most
    """

    def __init__(
        self, prepare: str, *arguments: str, seconds: float, within: float, start: float, longest: int
    ) -> None:
        self.seconds, self.within, self.start, self.longest = seconds, within, start, longest
        self._work = (prepare, *arguments)
        self._forget()

    def _forget(self) -> None:
        self._one, self._owner = threading.Lock(), os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._ready = False

    @property
    def pid(self) -> int | None:
        """Number of the process that runs now; None for none."""
        return self._process.pid if self._process is not None and self._owner == os.getpid() else None

    def ask(self, question: Any) -> dict[str, Any]:
        """The answer to a question of plain values.

        Raises:
            AnswerError: ``StartError`` where the question was not asked
        """
        try:
            message = json.dumps([self.seconds, self.within, question]).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise AnswerError(f"the question is no plain data ({error})") from None
        with self._held():
            line = self._started(self.start)
            try:
                return self._exchanged(line, message)
            except (OSError, AnswerError) as error:
                if self._end() == -signal.SIGPROF:
                    raise AnswerError(f"took longer than {self.seconds:g} seconds of computing") from None
                raise AnswerError(str(error) or "its process has ended") from None
            except BaseException:  # Ctrl-C: its answer, when it comes, would be taken for that of the next question
                self._end()
                raise

    def begin(self) -> None:
        """Start the process, unless it runs, however long that takes.

        Raises:
            StartError: it has ended
        """
        with self._held():
            self._started(None)

    def close(self) -> None:
        """End the process, whatever it does."""
        if (process := self._process) is not None and self._owner == os.getpid():
            process.kill()  # a question that waits for its answer ends at once
            with self._one:
                self._end()

    def _held(self) -> threading.Lock:
        if self._owner != os.getpid():  # a fork: the process and its answers are the other's
            if self._line is not None:
                self._line.close()
            self._forget()
        return self._one

    def _started(self, seconds: float | None) -> socket.socket:
        try:
            if self._line is None:
                self._line, theirs = socket.socketpair()
                with theirs:
                    words = (json.dumps(sys.path), str(theirs.fileno()), *self._work)
                    command = [sys.executable, "-I", "-c", _CODE.format(__name__), *words]
                    self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
                atexit.register(self.close)
            if not self._ready:
                self._line.settimeout(seconds)
                self._line.recv(1, socket.MSG_PEEK)
                self._exchanged(self._line, b"")
                self._ready = True
            return self._line
        except TimeoutError:
            raise StartError(f"it has not started within {seconds:g} seconds") from None
        except (OSError, AnswerError) as error:
            self._end()
            raise StartError(f"it could not start ({error or 'its process has ended'})") from None

    def _exchanged(self, line: socket.socket, message: bytes) -> dict[str, Any]:
        """Send a message, unless it is empty, and receive an answer."""
        until = time.monotonic() + self.within

        def received(size: int) -> bytes:
            parts = bytearray()
            while len(parts) < size:
                line.settimeout(max(until - time.monotonic(), 1e-3))
                if not (part := line.recv(min(size - len(parts), 2**20))):
                    raise AnswerError("its process has ended")
                parts += part
            return bytes(parts)

        try:
            if message:
                line.settimeout(self.within)
                line.sendall(len(message).to_bytes(_SIZE) + message)
            size = int.from_bytes(received(_SIZE))
            if size > self.longest:
                raise AnswerError(f"its answer has {size:,} bytes, more than {self.longest:,}")
            answer = json.loads(received(size).decode(errors="surrogatepass"))
        except TimeoutError:
            raise AnswerError(f"took longer than {self.within:g} seconds") from None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise AnswerError("its process has answered something else")
        return answer

    def _end(self) -> int | None:
        """End the process; how it has ended, as ``Popen.returncode``."""
        atexit.unregister(self.close)
        ended = None
        if self._process is not None:
            self._process.kill()
            ended = self._process.wait()
        if self._line is not None:
            self._line.close()
        self._process = self._line = None
        self._ready = False
        return ended


def work(line: str, prepare: str, *arguments: str) -> None:
    """In the process: prepare, say so, and answer until the other end is closed.

    The signals of both timers end the process, even in compiled code. That of the time that passes is for a process
    whose questioner was killed.

    Args:
        line: number of the file to read questions from and to write answers to
        prepare, arguments: of ``Answering``
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    module, _, name = prepare.partition(":")
    answer = getattr(importlib.import_module(module), name)(*arguments)
    with socket.socket(fileno=int(line)) as other, other.makefile("rwb") as file:
        given: dict[str, Any] = {}
        while True:
            said = json.dumps(given, ensure_ascii=False).encode(errors="surrogatepass")
            file.write(len(said).to_bytes(_SIZE) + said)
            file.flush()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not (size := file.read(_SIZE)):
                return
            seconds, within, question = json.loads(file.read(int.from_bytes(size)))
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.setitimer(signal.ITIMER_REAL, within + _ALONE)
            given = answer(question)


# --- a limit on the time that foreign code may take ---


class Overdue(BaseException):
    """The time is over. Not an ``Exception``: code that catches all of its own would continue."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``Overdue`` inside the block after some seconds, and again every second until the block ends.

    By the alarm signal, which interrupts Python, regular expressions, sleeping and waiting. Not compiled code that
    never looks for signals; and outside the main thread, which alone receives them, there is no limit.

    Args:
        seconds: of wall-clock time; infinity for no limit
    """
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        raise Overdue(f"took longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, end)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer)  # an outer limit ends later than it would have, but ends
        signal.signal(signal.SIGALRM, before)
