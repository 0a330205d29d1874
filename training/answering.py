"""A process that answers questions one at a time: for work that may not end, or not soon, beside other work."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

Answer = Callable[[Any], dict[str, Any]]


class AnswerError(Exception):
    """No answer: it was late or too long, or its process has ended."""


class Answering:
    """Answers in a process of its own, which is started when it is first needed.

    It is killed where it is late, even in compiled code, and started again for the next question. Questions wait for
    each other, so any thread may ask. Both sides send JSON, since an answer of a process that a question has taken over
    must do nothing here.

    Args:
        prepare: a function of a module, called in the process with ``arguments``; returns what answers
        arguments: plain values
        seconds: for an answer
        start: seconds for the process to start and to prepare
        longest: bytes of an answer at most
    """

    def __init__(
        self, prepare: Callable[..., Answer], *arguments: Any, seconds: float, start: float, longest: int
    ) -> None:
        self.seconds, self.start, self.longest = seconds, start, longest
        self._work = (prepare, arguments)
        self._one = threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def ask(self, question: Any) -> dict[str, Any]:
        """The answer to a question of plain values.

        Raises:
            AnswerError
        """
        with self._one:
            try:
                connection = self._started()
                connection.send_bytes(json.dumps(question).encode())
                return self._received(connection, self.seconds)
            except (EOFError, OSError, AnswerError) as error:
                self._end()
                raise AnswerError(str(error) or "its process has ended") from None

    def close(self) -> None:
        """End the process, whatever it does."""
        if (process := self._process) is not None:
            process.kill()  # a question that waits for its answer ends at once
        with self._one:
            self._end()

    def _started(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, *self._work), name="answering", daemon=True)
            self._process.start()
            theirs.close()  # its end is then seen here
            self._received(self._connection, self.start)
        return self._connection

    def _received(self, connection: Connection, seconds: float) -> dict[str, Any]:
        if not connection.poll(seconds):
            raise AnswerError(f"took longer than {seconds:g} seconds")
        try:
            answer = json.loads(connection.recv_bytes(self.longest))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise AnswerError("its process has answered something else")
        return answer

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _work(connection: Connection, prepare: Callable[..., Answer], arguments: tuple[Any, ...]) -> None:
    """Answer until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    answer = prepare(*arguments)
    connection.send_bytes(b"{}")
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(json.dumps(answer(question)).encode())
