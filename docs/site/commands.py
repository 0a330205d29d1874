"""A page for every command: its form, its help, and the documents that use it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from unittest import mock

from blockwright.commands import Command, commands
from blockwright.lab.catalogue import table
from docs.site.markdown import Pages, fence, link, title

COLUMNS = "84"  # of the help


def place(name: str) -> str:
    """The page of a command."""
    return f"reference/commands/{name}.md"


def add(pages: Pages) -> None:
    """Add the pages of all commands, and their list. The documents are already among the pages."""
    known, rows = commands(), []
    uses = _uses(pages, known)
    for name, offered in known.items():
        pages.add(place(name), _page(name, offered, uses[name]))
        rows.append([link(f"`blockwright {name}`", place(name)), f"{offered.about[0].upper()}{offered.about[1:]}"])
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


def _page(name: str, offered: Command, uses: Mapping[str, str]) -> str:
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
