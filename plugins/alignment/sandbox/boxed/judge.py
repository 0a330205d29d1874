"""The inside of the judge's box: run tests on a program that is in another box. Standard library only.

The judge writes a report of each event to stdout: READY once this process is restricted, then for each test PASSED or
FAILED, or ABSENT and nothing else if the program's box did not start. Each report is signed with a key that only the
judge and its parent have: a program that could write to this stdout could still not forge one.
"""

from __future__ import annotations

import ast
import builtins
import hmac
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

from blockwright.plugins.alignment.sandbox.boxed.exchange import Ended, packed, receive, send, unpacked
from blockwright.plugins.alignment.sandbox.boxed.restrict import restrict

READY, PASSED, FAILED, ABSENT = b"r", b"1", b"0", b"x"
SIZE = 32  # bytes of a report


class Program:
    """The program in the other box.

    Args:
        source: the pipe of its answers
        sink: the pipe of questions to it

    Attributes:
        ended: the program answers no more
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink = source, sink
        self._held: dict[int, Held] = {}
        self.ended = False

    def ask(self, act: str, *given: Any) -> Any:
        """Ask the program to do something, and return the result; an exception of the program is raised again.

        Raises:
            Ended: the program has ended, or gives no answer
        """
        message = [act, packed(given, _number)]
        if self.ended:
            raise Ended
        try:
            send(self._sink, message)
            answer = receive(self._source)
            if not isinstance(answer, dict) or not answer.keys() & {"value", "raised"}:
                raise Ended
            value = None if "raised" in answer else unpacked(answer["value"], self._held_by)
        except (Ended, OSError, ValueError, TypeError, KeyError, RecursionError):
            self.ended = True
            raise Ended from None
        if "raised" in answer:
            raise _error(answer)
        return value

    def _held_by(self, number: int) -> Held:
        return self._held.setdefault(int(number), Held(self, int(number)))


class Held:
    """An object of the program: a function, a class, or what it has made of one.

    It is equal to itself alone, and does not calculate: an operator would give the program the other operand, and the
    program would answer for both. Its attributes, items and length are plain data that a test compares.
    """

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._program.ask("call", self, args, named)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("item", self, key)

    def __len__(self) -> int:
        return self._program.ask("len", self)

    def __iter__(self) -> Any:
        return self._program.ask("iter", self)

    def __next__(self) -> Any:
        return self._program.ask("next", self)

    def __bool__(self) -> bool:
        return self._program.ask("bool", self)

    def __str__(self) -> str:
        return self._program.ask("str", self)

    def __repr__(self) -> str:
        return self._program.ask("repr", self)


def _number(value: Any) -> int:
    if type(value) is not Held:
        raise TypeError(f"a program is given plain data, not a {type(value).__name__}")
    number: int = value._number
    return number


def _error(answer: dict[str, Any]) -> BaseException:
    """The nearest of Python's own exceptions to the one that the program has raised."""
    for name in list(answer["raised"])[:20]:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, BaseException):
            try:
                return kind(str(answer.get("text")))
            except TypeError:
                continue
    return RuntimeError(str(answer.get("text")))


def names_of(test: ast.AST) -> tuple[set[str], set[str]]:
    """The names that a test reads, without builtins: variables, and modules of the standard library whose attributes
    it reads."""
    loaded = (node.id for node in ast.walk(test) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    read = {name for name in loaded if not name.startswith("__")} - set(dir(builtins))
    holders = {n.value.id for n in ast.walk(test) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    modules = read & holders & sys.stdlib_module_names
    return read - modules, modules


def passes(test: str, space: dict[str, Any], program: Program) -> bool:
    """True if a test raises nothing, and the program still answers after it.

    A name that neither the tests nor Python define is the program's.
    """
    try:
        tree = ast.parse(test, "test.py")
        names, modules = names_of(tree)
        space.update({name: importlib.import_module(name) for name in modules - set(space)})
        for name in sorted(names - set(space)):
            try:
                space[name] = program.ask("name", name)
            except KeyError:
                continue
        exec(compile(tree, "test.py", "exec"), space)
    except BaseException:
        return False
    return not program.ended


def signed(event: bytes, number: int, key: bytes) -> bytes:
    """The report of an event, the first of which has the number 0."""
    return hmac.digest(key, b"%d %s" % (number, event), "sha256")


def report(tests: Sequence[str], program: Program, verdict: int, key: bytes) -> None:
    """Run the tests, and write a report of each."""
    space: dict[str, Any] = {"__name__": "test"}
    for number, test in enumerate(tests, 1):
        os.write(verdict, signed(PASSED if passes(test, space, program) else FAILED, number, key))


def main() -> None:
    request = json.load(sys.stdin)
    verdict, key = os.dup(1), bytes.fromhex(request["key"])
    for number in (0, 1):
        os.dup2(2, number)  # which leads nowhere
    source, sink = os.fdopen(request["source"], "rb"), os.fdopen(request["sink"], "wb")
    restrict(request)
    os.write(verdict, signed(READY, 0, key))
    try:
        started = receive(source) == "ready"
    except Ended:
        started = False
    if started:
        report(request["tests"], Program(source, sink), verdict, key)
    else:
        os.write(verdict, signed(ABSENT, 1, key))
    os._exit(0)
