"""Load a model, make its batch, and serve it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from contextlib import closing
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts import Drafter
from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.timing import multiply_fastest
from blockwright.lab.card import in_bytes
from blockwright.lab.generate import drafter
from blockwright.lab.listening import PLAIN, Site, check_free, is_loopback, listen, until_signal
from blockwright.lab.writer import Writer, begin
from blockwright.plugins.serve.app import application
from blockwright.plugins.serve.engine import Engine
from blockwright.plugins.serve.served import Served, chat_of
from blockwright.registry import BlockError, ConfigError

# --- the server -------------------------------------------------------------------------------------------------------


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


ROWS, ROOM = 8, 2048


def serve(options: argparse.Namespace, key: str | None) -> None:
    """Serve until a signal.

    Args:
        options: of the command
        key: that requests must show; None for none

    Raises:
        ConfigError: the model, the address or a size is impossible
    """
    check_free(options.host, options.port)
    keep_freed_memory()
    writer = Writer.open(options.model, dtype=options.dtype, device=options.device, visits=options.visits)
    writer.cached(options.bits)
    multiply_fastest(writer.decoder)
    if options.bos:
        begin(writer.words, "--bos", "Leave --bos out")
    chat = chat_of(options.model, writer, options.chat)
    batch = batch_of(writer, options)
    name = options.name or Path(options.model).resolve().stem
    served = Served(name, writer, batch.room, batch.rows + options.queue, chat, options.bos)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("blockwright.serve").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # not a line for whatever a client sends that is no HTTP
    with listen(options.host, options.port) as listening:
        engine = Engine(batch, options.queue)
        print(_start(served, batch, listening, options), flush=True)
        site = Site(listening.getsockname()[1], is_loopback(listening), options.allow_host)
        if key is None and not site.loopback:
            print("warning: any machine that reaches this address can use the model: set a key", file=sys.stderr)
        Server(application(engine, served, site, key), engine, options.grace).run_until_signal(listening)


def batch_of(writer: Writer, options: argparse.Namespace) -> Batch:
    """The batch of a server.

    Raises:
        ConfigError: a size is impossible, the model's blocks cannot join rows, or the drafts do not suit it
    """
    room = _room(writer.decoder, options.room)
    drafts = None if options.drafts is None else drafter(writer, options.drafts, options.draft_tokens)
    try:
        return Batch(
            writer.decoder, _rows(writer.decoder, room, drafts, options), room, bits=options.bits, drafts=drafts
        )
    except BlockError as error:
        raise _at_its_option(error, room, options) from None


def _at_its_option(error: BlockError, room: int, options: argparse.Namespace) -> ConfigError:
    match error.parameter:
        case "caches":
            chosen = {"--memory": options.memory, "--rows": options.rows, "--room": room}
            option = next(name for name, value in chosen.items() if value is not None)
            return ConfigError(option, chosen[option], error.rule, "Lower --rows, --memory, --room or --bits")
        case "drafts":
            return ConfigError("--drafts", options.drafts, error.rule, f"{error.remedy}, by --room; or leave it out")
        case _:
            return ConfigError("MODEL", options.model, f"{error.parameter}: {error.rule}", error.remedy)


def _room(decoder: Decoder, wanted: int | None) -> int:
    limit = decoder.position.limit
    if wanted is None:
        return min(ROOM, limit or ROOM, decoder.config["max_positions"])
    if limit is not None and wanted > limit:
        raise ConfigError("--room", wanted, f"the model has positions for {limit}", f"Write {limit} or fewer")
    return wanted


def _rows(decoder: Decoder, room: int, drafts: Drafter | None, options: argparse.Namespace) -> int:
    """Of ``--memory``: as many as fit, and one more in which prompts are read."""
    if options.memory is None:
        return options.rows or ROWS
    row = Batch(decoder, 1, room, bits=options.bits, drafts=drafts).nbytes // 2
    if options.memory < 2 * row:
        rule = f"a row of {room:,} tokens takes {row:,} bytes, and the one that reads prompts as many"
        raise ConfigError("--memory", options.memory, rule, f"Write at least {2 * row}, or less --room")
    return options.memory // row - 1


def _start(served: Served, batch: Batch, listening: socket.socket, options: argparse.Namespace) -> str:
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    values = served.writer.cached(options.bits) if options.bits else options.dtype
    chat = "no chat format: /v1/chat/completions is refused"
    if served.chat is not None:
        chat = f"chat format {served.chat.chat.node()['name']}"
    drafts = "" if options.drafts is None else f"; drafts: {options.drafts}, at most {batch.drafted_at_most} a pass"
    return (
        f"{served.name}: {batch.rows} rows of {batch.room:,} tokens, {options.queue} texts may wait; {chat}\n"
        f"caches: {in_bytes(batch.nbytes)} ({values}){drafts}\n"
        f"http://{host}:{port}/v1"
    )
