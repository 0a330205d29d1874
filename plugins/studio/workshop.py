"""A process that composes, so that the server answers meanwhile, and that ends where it takes too long."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

SECONDS = 20.0  # for an answer
START = 120.0  # seconds for the process to import what it needs
LONGEST = 64_000_000  # bytes of an answer


class LateError(Exception):
    """An answer that took too long, or a process that ended."""


class Workshop:
    """Answers one question at a time, in a process of its own. It is killed where it is late, and started again.

    Args:
        seconds: for an answer
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._one = threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request (studio/answers.py), of plain values.

        Raises:
            LateError
        """
        with self._one:
            try:
                connection = self._started()
                connection.send_bytes(json.dumps(request).encode())
                return self._received(connection, self.seconds)
            except (EOFError, OSError, LateError) as error:
                self._end()
                raise LateError(str(error) or "its process has ended") from None

    def start(self) -> None:
        """Start the process meanwhile, so that the first question need not wait for all of it."""
        threading.Thread(target=self._begin, daemon=True).start()

    def _begin(self) -> None:
        with contextlib.suppress(LateError):  # the server has ended meanwhile
            self.ask({"what": "forms"})

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
        with self._one:
            self._end()

    def _started(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs,), name="studio", daemon=True)
            self._process.start()
            theirs.close()  # its end is then seen here
            self._received(self._connection, START)
        return self._connection

    def _received(self, connection: Connection, seconds: float) -> dict[str, Any]:
        if not connection.poll(seconds):
            raise LateError(f"composing took longer than {seconds:g} seconds")
        return json.loads(connection.recv_bytes(LONGEST))

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _work(connection: Connection) -> None:
    """Answer until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    import torch

    from blockwright.plugins.studio.answers import answer

    torch.set_num_threads(1)  # nothing is computed but shapes
    answer({"what": "draw", "preset": "deepseek_v2", "changes": {}})  # the first of a process is slow
    connection.send_bytes(b"{}")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(json.dumps(answer(request)).encode())
