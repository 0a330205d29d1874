"""Read the JSON object of a request that may be hostile: limited in bytes, time, depth and number of values."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from blockwright.registry import BlockError, ConfigError
from blockwright.registry.folder import parse_json
from blockwright.registry.schema import conforms, fault

# --- answers that are errors, of OpenAI's form: ``{"error": {"message", "type", "param", "code"}}`` -------------------


LONGEST = 100  # characters of a client's value that a message repeats


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP
        message: the rule, and what to write instead
        param: the field at fault
        code: of OpenAI's, for programs
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def shown(value: Any) -> str:
    """A client's value in a message: short, and in ASCII, so that any message can be sent and logged."""
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def shown_name(name: str) -> str:
    """A client's name of a field, as ``shown``: half a character could not be sent."""
    return name[:LONGEST].encode("ascii", "backslashreplace").decode()


def refused(error: ConfigError | BlockError, param: str) -> RefusedError:
    """The refusal of a request that this project's own checks refuse."""
    return RefusedError(400, f"{param} = {shown(error.value)}: {error.rule}. {error.remedy}", param, "invalid_value")


# --- the fields of a request: each is read once by its type, and what nothing has read is refused by name -------------


ABOUT_THE_SENDER = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})

# Field → the values that change nothing, which clients send by default. No other value is supported; null always is.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


class Fields:
    """The fields of a JSON object, taken one by one.

    Args:
        values: the object
        where: its place in the request: ``messages.0.``
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.left, self.where = dict(values), where

    def take(self, name: str, hint: Any, default: Any = None) -> Any:
        """The value of a field; ``default`` where it is missing or null.

        Args:
            name: of the field
            hint: its type, with bounds as in registry/ranges.py

        Raises:
            RefusedError: it is of another type, or out of its bounds
        """
        value = self.left.pop(name, None)
        if value is None:
            return default
        if not conforms(value, hint):
            raise self.refuse(name, value, fault(value, hint))
        return value

    def check_count(self, name: str, most: int) -> None:
        """Refuse a list that is longer than any that can be answered, before each of its items is looked at.

        Raises:
            RefusedError
        """
        value = self.left.get(name)
        if isinstance(value, list) and len(value) > most:
            raise self.refuse(name, value[:2], f"has {len(value):,} items, and at most {most:,} can be read")

    def need(self, name: str, hint: Any) -> Any:
        """As ``take``, of a field that must be present."""
        if (value := self.take(name, hint)) is None:
            raise self.refuse(name, None, "is required")
        return value

    def refuse(self, name: str, value: Any, rule: str, code: str = "invalid_value") -> RefusedError:
        """The refusal of a field's value."""
        return RefusedError(400, f"{self.where}{name} = {shown(value)}: {rule}", f"{self.where}{name}", code)

    def finish(self, neutral: Mapping[str, tuple[Any, ...]] = WITHOUT_EFFECT) -> None:
        """Refuse the fields that are left, so that none is silently without effect.

        Args:
            neutral: field → the values that change nothing

        Raises:
            RefusedError
        """
        for name, value in self.left.items():
            if value is not None and name not in ABOUT_THE_SENDER and value not in neutral.get(name, ()):
                raise self.refuse(shown_name(name), value, "is not supported by this server", "unsupported_parameter")


# --- work that ends when its client hangs up --------------------------------------------------------------------------


T = TypeVar("T")


class GoneError(Exception):
    """The client has hung up, so that no answer can reach it."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled if the client hangs up meanwhile.

    Starlette cancels a response that streams, and nothing else.

    Args:
        receive: of the request, whose body has been read
        work: what answers it

    Raises:
        GoneError: the client has hung up first
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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
