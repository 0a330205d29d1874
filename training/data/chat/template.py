"""Compile and render Jinja templates, each a program of its author, in a process for them alone (template_process.py).

That process imports little, so that it starts at once and is small.
"""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

OPEN, CLOSE, HIDDEN = "\ue000", "\ue001", "\ue002"  # private-use characters, which no real text holds
STATM = Path("/proc/self/statm")


def prepare(memory: str, longest: str) -> Callable[[tuple[str, Mapping[str, Any] | None]], dict[str, str]]:
    """What answers a template and the values of its variables by ``text``, or by why it is ``refused``.

    For null in place of values the template is compiled only.

    Args:
        memory: bytes of address space beside what this process has now; allocations beyond them raise ``MemoryError``.
            Systems without /proc have no limit
        longest: characters of a text at most
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    extensions = [_marks(), "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _json  # Jinja's own escapes for HTML
    environment.from_string("{{ 1 }}").render()  # what is imported on first use
    if STATM.is_file():
        wanted = int(STATM.read_text().split()[0]) * resource.getpagesize() + int(memory)
        before = [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *before]),) * 2)
    compiled = lru_cache(maxsize=1)(environment.from_string)

    def answer(question: tuple[str, Mapping[str, Any] | None]) -> dict[str, str]:
        template, values = question
        try:
            made = compiled(template)
            text = "" if values is None else made.render(**values)
        except Exception as error:  # Jinja's own, those of Python's compiler, complaints of templates
            return {"refused": " ".join(str(error).split())[:200] or type(error).__name__}
        if len(text) > int(longest):
            return {"refused": f"it writes {len(text):,} characters, more than {int(longest):,}"}
        return {"text": text}

    return answer


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
