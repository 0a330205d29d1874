"""Read the JSON object of a request that may be hostile: limited in bytes, time, depth and number of values."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from blockwright.plugins.serve.refusal import RefusedError
from blockwright.plugins.serve.waiting import GoneError
from blockwright.registry import ConfigError
from blockwright.registry.folder import parse_json

SECONDS = 30.0  # for a body to arrive
LEAST, OF_A_TOKEN = 2**20, 64  # bytes that may be sent whatever the room, and for each token of it
DROPPED = 2**24  # bytes of a body too long that are read and dropped: before its end few clients look for an answer


def most_bytes(room: int) -> int:
    """Bytes that a request may have: many times those of a prompt that fills the room."""
    return LEAST + OF_A_TOKEN * room


async def read_object(request: Request, most: int) -> dict[str, Any]:
    """The JSON object of a request.

    A body must be declared as JSON, as that of any other type may be sent by a form of a page.

    Args:
        request: its body is read as it comes, and no further than ``most``
        most: bytes

    Raises:
        RefusedError: it is too long, too slow, no JSON, no object, nested too deep
        GoneError: the client has hung up meanwhile
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, "The body must be JSON. Send the header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError(415, "The body must not be compressed")
    try:
        async with asyncio.timeout(SECONDS):
            data = await _read(request, most)
    except TimeoutError:
        raise RefusedError(408, f"The body has not arrived within {SECONDS:g} seconds") from None
    except ClientDisconnect:
        raise GoneError from None
    try:  # in a thread: streams continue meanwhile
        values = await asyncio.to_thread(lambda: parse_json(data.decode(), "body"))
    except UnicodeDecodeError:
        raise RefusedError(400, "The body is not UTF-8") from None
    except ConfigError as error:
        raise RefusedError(400, f"The body {error.rule}") from None
    if not isinstance(values, dict):
        raise RefusedError(400, "The body must be a JSON object")
    return values


async def _read(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isdecimal() and len(declared) < 20 else DROPPED + 1
    data = bytearray()
    if size <= DROPPED:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size <= most:
                data += part
            if size > DROPPED:
                break
    if size > most:
        raise RefusedError(413, f"The body is longer than {most:,} bytes", code="request_too_large")
    return bytes(data)
