"""Load a model, make its batch, and serve it."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from pathlib import Path

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts.base import Drafter
from blockwright.blocks.kernels.machine import keep_freed_memory, set_float32_matmul
from blockwright.lab.card import in_bytes
from blockwright.lab.drafter import drafter
from blockwright.lab.listening import Site, check_free, is_loopback, listen
from blockwright.lab.writer import Writer, begin
from blockwright.plugins.serve.app import application
from blockwright.plugins.serve.engine import Engine
from blockwright.plugins.serve.served import Served, chat_of
from blockwright.plugins.serve.server import Server
from blockwright.registry import BlockError, ConfigError

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
    set_float32_matmul("auto", writer.decoder.output_weight.device.type)
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
    values = f"{options.bits} bits" if options.bits else options.dtype
    chat = "no chat format: /v1/chat/completions is refused"
    if served.chat is not None:
        chat = f"chat format {served.chat.chat.node()['name']}"
    drafts = "" if options.drafts is None else f"; drafts: {options.drafts}, at most {batch.drafted_at_most} a pass"
    return (
        f"{served.name}: {batch.rows} rows of {batch.room:,} tokens, {options.queue} texts may wait; {chat}\n"
        f"caches: {in_bytes(batch.nbytes)} ({values}){drafts}\n"
        f"http://{host}:{port}/v1"
    )
