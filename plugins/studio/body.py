"""Read the JSON object of a request: limited in bytes, time, depth and number of values."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from blockwright.registry import ConfigError
from blockwright.registry.folder import parse_json

SECONDS = 10.0  # for a body to arrive
MOST = 200_000  # bytes


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        HTTPException: it is too long, too slow, no JSON, or no object
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "The body must be JSON, and declared so")
    data = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > MOST:
                    raise HTTPException(413, f"The body is longer than {MOST:,} bytes")
        values = parse_json(data.decode(), "body")
    except TimeoutError:
        raise HTTPException(408, f"The body has not arrived within {SECONDS:g} seconds") from None
    except (UnicodeDecodeError, ConfigError):
        raise HTTPException(400, "The body is not JSON") from None
    if not isinstance(values, dict):
        raise HTTPException(400, "The body must be a JSON object")
    return values
