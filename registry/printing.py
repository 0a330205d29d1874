"""Printing for all commands: framed on a terminal, complete plain lines when piped or written to a file.

Without a terminal, rich assumes 80 columns, or ``COLUMNS``, and truncates names with "…". Here nothing is truncated or
wrapped off a terminal, and a table row is one line, so that ``grep``, ``sort`` and ``awk`` see all of it.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

UNLIMITED = 1_000_000  # columns; rich wants a number


def console(file: IO[str] | None = None) -> Console:
    """A console for lines: a terminal has its width, anything else is unlimited.

    Args:
        file: None for standard output
    """
    made = Console(file=file, highlight=False)
    return made if made.file.isatty() else Console(file=file, highlight=False, width=UNLIMITED)


def show(table: Table, file: IO[str] | None = None) -> None:
    """Print a table: framed on a terminal, else as ``lines``.

    Args:
        table: of texts
        file: None for standard output
    """
    out = console(file)
    if out.file.isatty():
        out.print(table)
    else:
        print(*lines(table), sep="\n", file=out.file)


def printable(text: str) -> str:
    """A text without characters that would act on a terminal: escape sequences of an untrusted model."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def show_text(text: str, title: str, file: IO[str] | None = None) -> None:
    """Print a text under its title, in a box on a terminal, of what is ``printable``."""
    out, text = console(file), printable(text)
    if out.file.isatty():
        out.print(Panel(Text(text), title=title))
    else:
        print(f"{title}:\n{text}", file=out.file)


def lines(table: Table) -> Iterator[str]:
    """A table as plain text: title, header, a line per row with aligned columns, caption."""
    rows = [[_plain(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]
    header = [_plain(column.header) for column in table.columns]
    if table.show_header and any(header):
        rows.insert(0, header)
    if table.title:
        yield _text(table.title)
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for cell, width, column in zip(row, widths, table.columns, strict=True):
            room = " " * (width - cell_len(cell))
            cells.append(room + cell if column.justify == "right" else cell + room)
        yield "  ".join(cells).rstrip()
    if table.caption:
        yield _text(table.caption)


def _plain(cell: Any) -> str:
    """The text of a cell in one line."""
    first, *more = _text(cell).splitlines() or [""]
    return " ".join([first.rstrip(), *(line.strip() for line in more)])


def _text(cell: Any) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)


class Outlived:
    """A stream that its process outlives: once the reader has gone, what is written goes nowhere.

    Args:
        stream: a pipe, file or terminal; None if it was closed before the start
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 # for the whole process

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._forget()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._forget()

    def _forget(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
