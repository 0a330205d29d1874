"""The server: uvicorn over a socket, which ends with its clients served, and cuts those that do not read."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from blockwright.lab.listening import PLAIN, until_signal
from blockwright.plugins.serve.engine import Engine

STALLED = 30.0  # seconds for which a client may read nothing of what waits for it, or send nothing at first
BACKSTOP = 5.0  # seconds for requests to end once their jobs have been ended


class Deadline:
    """Ends a connection ``STALLED`` seconds after its start, unless it is stopped before.

    Args:
        transport: of the connection
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start it; nothing if it runs."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(STALLED, self._transport.abort)

    def stop(self) -> None:
        """Stop it; nothing if it does not run."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Connection(H11Protocol):
    """A connection that ends if its client reads nothing, since what waits for it takes memory, or if the head of a
    request does not arrive in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, and not for ever."""
        super().connection_made(transport)
        self._unread, self._head = Deadline(transport), Deadline(transport)
        self._head.start()

    def data_received(self, data: bytes) -> None:
        """A part of a request: bodies have a limit of their own."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head.stop()
        else:
            self._head.start()

    def pause_writing(self) -> None:
        """The client is behind by as much as is kept for it."""
        super().pause_writing()
        self._unread.start()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._unread.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._unread.stop()
        self._head.stop()


class Server(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C; then no request is accepted, and those at work may end.

    Args:
        app: the application
        engine: runs its jobs
        grace: seconds for requests to end; then their jobs are ended
    """

    def __init__(self, app: ASGIApp, engine: Engine, grace: float) -> None:
        config = uvicorn.Config(app, http=Connection, timeout_graceful_shutdown=int(grace + BACKSTOP), **PLAIN)
        super().__init__(config)
        self.engine, self.grace = engine, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the requests at work."""
        asyncio.get_running_loop().call_later(self.grace, self.engine.end)
        await super().shutdown(sockets)

    def run_until_signal(self, listening: socket.socket) -> None:
        """Serve in the main thread."""
        with closing(self.engine), until_signal():
            self.run([listening])
