"""``python -m blockwright.api [--check]``: docs/api.md, the public names with their signatures and summaries."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import blockwright
from blockwright.registry.command import run_command

STUB = Path(__file__).with_name("__init__.pyi")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
HEAD = """\
# The public interface

`import blockwright` gives these names, each imported when first used. Only they are stable: changes are recorded in
[CHANGELOG.md](../CHANGELOG.md). This page is generated: `python -m blockwright.api > docs/api.md`.
"""


def sections() -> Iterator[tuple[str, list[str]]]:
    """Heading → public names, in the order of the stub."""
    for part in STUB.read_text().split("\n\n")[1:]:
        heading = re.match(r"# (.+)", part)
        if heading:
            yield heading[1][0].upper() + heading[1][1:], re.findall(r" as (\w+)$", part, re.M)


def entry(name: str, value: Any) -> str:
    """One name: its signature or value, the first paragraph of its docstring, and where it is defined."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):  # a type alias
        return f"### `{name}`\n\n`{name} = {value}`\n".replace("typing.", "")
    summary = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    kind = "class " if inspect.isclass(value) else ""
    return f"### `{name}`\n\n`{kind}{name}{signature(value)}`, from `{value.__module__}`\n\n{summary}\n"


def signature(value: Any) -> str:
    """The parameters with annotations without modules; nothing for classes the user does not construct."""
    own = "__init__" in vars(value) if inspect.isclass(value) else True
    return re.sub(r"\b(?:\w+\.)+(?=[A-Za-z]\w*)", "", str(inspect.signature(value))).replace("'", "") if own else ""


def markdown() -> str:
    """The whole page."""
    found = [
        "\n".join([f"## {heading}\n", *(entry(n, getattr(blockwright, n)) for n in names)])
        for heading, names in sections()
    ]
    return "\n".join([HEAD, *found])


def main(arguments: Sequence[str]) -> int:
    """Print the page; with ``--check``, report whether docs/api.md is current."""
    if list(arguments) == ["--check"]:
        current = PAGE.is_file() and PAGE.read_text() == markdown()
        print("docs/api.md is current" if current else "docs/api.md is stale: python -m blockwright.api > docs/api.md")
        return 0 if current else 1
    print(markdown(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
