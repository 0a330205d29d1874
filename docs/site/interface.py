"""What users call: a page for every public name, which mkdocstrings fills from the source, and for every command."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from unittest import mock

import blockwright
from blockwright import api
from blockwright.commands import Command, commands
from blockwright.lab.catalogue import table
from docs.site.markdown import Pages, fence, link, prose, title


def place(name: str) -> str:
    """The page of a public name."""
    return f"reference/interface/{name}.md"


def add(pages: Pages) -> None:
    """Add the pages of all public names, and their list."""
    parts = [
        "# The public interface",
        "`import blockwright` gives these names, each imported when first used. Only they are stable:"
        f" {link('changes', 'project/changes.md')} are recorded.",
    ]
    for heading, names in api.sections():
        rows = [[link(f"`{name}`", place(name)), _summary(name)] for name in names]
        parts += [f"## {heading}", "\n".join(table(["name", "what it is"], rows))]
        for name in names:
            pages.add(place(name), f"# {name}\n\n::: blockwright.{name}\n")
    pages.add("reference/interface/index.md", "\n\n".join(parts))


def _summary(name: str) -> str:
    value = getattr(blockwright, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return "a type"
    return prose(" ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split()))


COLUMNS = "84"  # of the help


def command_place(name: str) -> str:
    """The page of a command."""
    return f"reference/commands/{name}.md"


def add_commands(pages: Pages) -> None:
    """Add the pages of all commands, and their list. The documents are already among the pages."""
    known, rows = commands(), []
    uses = _uses(pages, known)
    for name, offered in known.items():
        pages.add(command_place(name), _command(name, offered, uses[name]))
        rows.append(
            [link(f"`blockwright {name}`", command_place(name)), f"{offered.about[0].upper()}{offered.about[1:]}"]
        )
    listed = "\n".join(table(["command", "what it does"], rows))
    about = f"Each takes `--help`. {link('Refusals', 'reference/refusals.md')} explains their errors and exit codes."
    pages.add("reference/commands/index.md", "\n\n".join(["# Commands", about, listed]))


def _uses(pages: Pages, known: Mapping[str, Command]) -> dict[str, dict[str, str]]:
    """Command → the documents that show it in a block of code, with their titles."""
    found: dict[str, dict[str, str]] = {name: {} for name in known}
    for page, text in pages.texts.items():
        if page.startswith(("how-to/", "explanation/", "tutorial")):
            for name in re.findall(r"^\s*blockwright ([a-z-]+)", text, re.M):
                if name in found:
                    found[name][page] = title(text)
    return found


def _command(name: str, offered: Command, uses: Mapping[str, str]) -> str:
    shown = "\n".join(f"* {link(heading, page)}" for page, heading in sorted(uses.items()))
    return "\n\n".join(
        [
            f"# blockwright {name}",
            f"{offered.about[0].upper()}{offered.about[1:]}.",
            fence(f"blockwright {offered.form}", "text"),
            "## Help",
            fence(_help(offered), "text"),
            *(["## Documents that use it", shown] if shown else []),
        ]
    )


def _help(offered: Command) -> str:
    """What ``--help`` prints."""
    words = ["blockwright", offered.point.name, "--help"]
    with _printed(words) as out, contextlib.suppress(SystemExit):
        offered.run(["--help"])
    return out.getvalue().strip("\n")


@contextlib.contextmanager
def _printed(words: list[str]) -> Iterator[io.StringIO]:
    """What a command line prints in this process."""
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.dict(os.environ, {"COLUMNS": COLUMNS}),
        contextlib.redirect_stdout(out),
    ):
        yield out
