"""A Jinja template of a chat format: a program of its author, which runs in a sandbox, limited in time and memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from blockwright.training.memory_limit import memory_limit
from blockwright.training.time_limit import Overdue, time_limit

OPEN, CLOSE, HIDDEN = "\ue000", "\ue001", "\ue002"  # private-use characters, which no real text holds
SECONDS = 10.0  # to render a conversation
MEMORY = 2**30  # bytes, for the same
LONGEST = 2**25  # characters of a rendered conversation


class TemplateError(Exception):
    """A template is none, refuses what it is given, or takes too much; in its own words."""


class Template:
    """A template, in Jinja's sandbox.

    The limits are those of ``time_limit`` and ``memory_limit``: of time in the main thread alone, of memory for the
    whole process while it renders. Where other threads compute, use ``TemplateProcess``.

    Args:
        text: of the template

    Raises:
        TemplateError: it is no template, or takes too much: Jinja computes constant expressions when it compiles
    """

    def __init__(self, text: str) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        extensions = [_marks(), "jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _json  # Jinja's own escapes for HTML
        self._compiled = _limited(lambda: environment.from_string(text))

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for values of its variables.

        Raises:
            TemplateError: it raises an error, or takes too much
        """
        text = _limited(lambda: self._compiled.render(**values))
        if len(text) > LONGEST:
            raise TemplateError(f"it writes {len(text):,} characters, more than {LONGEST:,}")
        return text


def _limited(run: Callable[[], Any]) -> Any:
    try:
        with time_limit(SECONDS), memory_limit(MEMORY):
            return run()
    except (Exception, Overdue) as error:  # Jinja's own, those of Python's compiler, complaints of templates
        raise TemplateError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def _refuse(message: str) -> None:
    raise ValueError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter ``tojson`` with the arguments that it has in transformers, in their order."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    return re.sub(f"[^\0-~{HIDDEN}]", lambda found: json.dumps(found[0])[1:-1], text)  # what hides a word is removed


def _marks() -> type:
    """A Jinja extension for ``{% generation %}``, made when Jinja is there."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Marks(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    return Marks
