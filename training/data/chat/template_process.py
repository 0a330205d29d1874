"""A template in a process of its own, for programs that do other work meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from blockwright.training.data.chat import template
from blockwright.training.data.chat.template import Template, TemplateError

START = 30.0  # seconds for the process to start, and to compile the template
LATE = 2.0  # seconds beyond those of a template after which its process is killed
ANSWER = 12 * template.LONGEST  # bytes of an answer at most: six a character in JSON, and two of them beyond 16 bits


class TemplateProcess:
    """A ``Template`` whose limits hit no thread of this process, and hold in any thread.

    The process is started when it is first needed. It is killed where it does not answer in time, even in compiled
    code, and started again for the next conversation. Conversations wait for each other.

    Args:
        text: of the template, which has been compiled once
    """

    def __init__(self, text: str) -> None:
        self._text, self._one = text, threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def render(self, values: Mapping[str, Any]) -> str:
        """As ``Template.render``.

        Raises:
            TemplateError
        """
        with self._one:
            try:
                connection = self._started()
                connection.send_bytes(json.dumps(values).encode())
                answer = _received(connection, template.SECONDS + LATE)
            except (EOFError, OSError, TemplateError) as error:
                self._end()
                raise TemplateError(str(error) or "its process has ended") from None
        if (text := answer.get("text")) is None:
            raise TemplateError(str(answer.get("refused")))
        return str(text)

    def _started(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            work = (theirs, self._text, template.SECONDS)
            self._process = context.Process(target=_serve, args=work, name="template", daemon=True)
            self._process.start()
            theirs.close()  # its end is then seen here
            _received(self._connection, START)
        return self._connection

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _received(connection: Connection, seconds: float) -> dict[str, Any]:
    """An answer: it is JSON, since what a template made of its process must do nothing here."""
    if not connection.poll(seconds):
        raise TemplateError(f"took longer than {seconds:g} seconds")
    try:
        answer = json.loads(connection.recv_bytes(ANSWER))
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise TemplateError("its process has answered something else")
    return answer


def _serve(connection: Connection, text: str, seconds: float) -> None:
    """Render until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that uses it
    template.SECONDS = seconds
    compiled = Template(text)
    connection.send_bytes(b"{}")
    while True:
        try:
            values = json.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(json.dumps(_answer(compiled, values)).encode())


def _answer(compiled: Template, values: Mapping[str, Any]) -> dict[str, str]:
    try:
        return {"text": compiled.render(values)}
    except TemplateError as error:
        return {"refused": str(error)}
