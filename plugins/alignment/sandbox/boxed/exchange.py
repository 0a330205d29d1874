"""What the judge and the program exchange: plain data as JSON, a message a line. Standard library only.

Whatever one side sends, the other gets values of Python's own types, and numbers that name objects of the sender.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, BinaryIO

LONGEST = 10**6  # bytes of a message
SEQUENCES = (list, tuple, set, frozenset)
EXACT = 2**63  # larger integers are written in hexadecimal, which has no limit of digits


class Ended(BaseException):
    """The other side has ended, or does not keep to the form. Not an ``Exception``: no test is to catch it."""


def send(sink: BinaryIO, message: Any) -> None:
    """Write a message."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > LONGEST:
        raise OverflowError(f"more than {LONGEST:,} bytes")
    sink.write(line)
    sink.flush()


def receive(source: BinaryIO) -> Any:
    """Read a message.

    Raises:
        Ended: the pipe is closed, or the line is no message
    """
    line = source.readline(LONGEST + 1)
    if not line.endswith(b"\n"):
        raise Ended
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise Ended from None


def packed(value: Any, number_of: Callable[[Any], int]) -> Any:
    """A value as JSON has it; ``number_of`` gives the number of an object that is no plain data."""
    if isinstance(value, int) and not isinstance(value, bool) and not -EXACT < value < EXACT:
        return {"int": hex(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind in SEQUENCES:
        if isinstance(value, kind):
            return {kind.__name__: [packed(each, number_of) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[packed(k, number_of), packed(v, number_of)] for k, v in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"object": number_of(value)}


def unpacked(message: Any, object_of: Callable[[int], Any]) -> Any:
    """The value that ``packed`` has written, of Python's own types; ``object_of`` gives the object of a number.

    Raises:
        ValueError, TypeError, KeyError: the message has another form
    """
    if not isinstance(message, dict):
        if isinstance(message, list):
            raise TypeError("a list without its type")
        return message
    ((name, content),) = message.items()
    if name == "object":
        return object_of(content)
    if name == "dict":
        return {unpacked(k, object_of): unpacked(v, object_of) for k, v in content}
    for kind in SEQUENCES:
        if name == kind.__name__:
            return kind(unpacked(each, object_of) for each in content)
    plain: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "bytes": bytes.fromhex,
        "complex": lambda parts: complex(*parts),
    }
    return plain[name](content)
