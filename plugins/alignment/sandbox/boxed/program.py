"""The inside of a program's box: run the program, then do what the judge asks of it. Standard library only.

This process receives the program alone, never its tests, so whatever the program does to it, the program can only
change what it answers.
"""

from __future__ import annotations

import json
import operator
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from blockwright.plugins.alignment.sandbox.boxed.exchange import packed, receive, send, unpacked
from blockwright.plugins.alignment.sandbox.boxed.restrict import restrict

ACTS: dict[str, Callable[..., Any]] = {  # what a test may do to an object of the program
    "call": lambda function, args, named: function(*args, **named),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "str": str,
    "repr": repr,
}


class Served:
    """The objects of a program that tests hold, by number.

    Args:
        space: the names that the program has defined
    """

    def __init__(self, space: dict[str, Any]) -> None:
        self.space = space
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}  # id → number; the objects are kept, so that ids stay theirs

    def answer(self, act: str, arguments: Any) -> dict[str, Any]:
        """Do one thing, and pack its result or its exception."""
        try:
            values = unpacked(arguments, self.objects.__getitem__)
            value = self.space[values[0]] if act == "name" else ACTS[act](*values)
            return {"value": packed(value, self._number)}
        except BaseException as error:  # all that a program may raise
            return {"raised": [kind.__name__ for kind in type(error).__mro__], "text": _text(error)}

    def _number(self, value: Any) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except BaseException:
        return ""


def serve(space: dict[str, Any], source: BinaryIO, sink: BinaryIO) -> None:
    """Answer until the judge has ended."""
    served = Served(space)
    while True:
        answer = served.answer(*receive(source))
        try:
            send(sink, answer)
        except (OverflowError, ValueError, RecursionError) as error:
            send(sink, {"raised": [type(error).__name__], "text": str(error)})


def main() -> None:
    request = json.load(sys.stdin)
    source, sink = os.fdopen(request["source"], "rb"), os.fdopen(os.dup(1), "wb")
    for number in (0, 1):
        os.dup2(2, number)  # which leads nowhere
    restrict(request)
    send(sink, "ready")
    space: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(request["program"], "program.py", "exec"), space)
        serve(space, source, sink)
    except BaseException:  # of the program, or the judge has ended
        os._exit(1)
