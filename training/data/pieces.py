"""Text in pieces of bounded size, to read, split and tokenise files of any size in little memory.

A document is an iterable of consecutive pieces; where they are cut has no meaning. Positions within a document are
counted in characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from blockwright.registry.errors import ConfigError

BLOCK = 2**18  # bytes per read; later steps need up to 40 times as much


def read(path: Path, n_bytes: int | None = None) -> Iterator[str]:
    """Read a UTF-8 file in pieces, without a byte-order mark, line ends unchanged.

    Args:
        path: of the file
        n_bytes: how much to read from its beginning; null for all

    Raises:
        ConfigError: at ``data.corpus.files``, with the offset of the first byte that is not UTF-8
    """
    rest, offset = b"", 0  # incomplete character at the end of a block, and its offset
    with path.open("rb") as file:
        while n_bytes is None or file.tell() < n_bytes:
            block = file.read(BLOCK if n_bytes is None else min(BLOCK, n_bytes - file.tell()))
            text, rest = _decode(rest + block, path, offset, is_end=not block)
            if offset == 0:
                text = text.removeprefix("\ufeff")
            if text:
                yield text
            if not block:
                return
            offset = file.tell() - len(rest)


def _decode(data: bytes, path: Path, offset: int, is_end: bool) -> tuple[str, bytes]:
    try:
        return data.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        if not is_end and error.reason == "unexpected end of data":
            return data[: error.start].decode("utf-8"), data[error.start :]
        raise ConfigError(
            "data.corpus.files",
            str(path),
            f"the byte 0x{data[error.start]:02x} at offset {offset + error.start} is not UTF-8",
            f"Convert the file, for example: iconv -f LATIN1 -t UTF-8 '{path}'",
        ) from None


def documents(pieces: Iterable[str], separator: str) -> Iterator[Iterator[str]]:
    """Split a text at a separator, dropping blank documents, and line ends around the others.

    Each document must be read, or dropped, before the next is requested.

    Args:
        pieces: of the text
        separator: not empty
    """
    for _, numbered in groupby(_numbered(pieces, separator), key=itemgetter(0)):
        yield from _without_margins(text for _, text in numbered)


def _numbered(pieces: Iterable[str], separator: str) -> Iterator[tuple[int, str]]:
    """(number of the document, one piece of it)."""
    number, held = 0, ""
    for piece in pieces:
        first, *others = (held + piece).split(separator)
        for other in others:
            yield number, first
            number, first = number + 1, other
        done = max(0, len(first) - len(separator) + 1)  # the characters after it may begin a separator
        yield number, first[:done]
        held = first[done:]
    yield number, held


def _without_margins(pieces: Iterable[str]) -> Iterator[Iterator[str]]:
    """Nothing for a blank document, else the document without leading and trailing line ends."""
    pieces, margin = iter(pieces), ""
    for piece in pieces:
        margin += piece
        if margin.strip():
            yield _without_line_ends_behind([margin.lstrip("\n")], pieces)
            return


def _without_line_ends_behind(*parts: Iterable[str]) -> Iterator[str]:
    n_held = 0
    for part in parts:
        for piece in part:
            text = piece.rstrip("\n")
            if text:
                yield "\n" * n_held + text
                n_held = 0
            n_held += len(piece) - len(text)


def between(pieces: Iterable[str], begin: int, end: int) -> Iterator[str]:
    """The characters [begin, end) of a document."""
    place = 0
    for piece in pieces:
        if place >= end:
            return
        text = piece[max(0, begin - place) : end - place]
        place += len(piece)
        if text:
            yield text


def line_starts(pieces: Iterable[str], places: Sequence[int], length: int) -> list[int]:
    """For each position in a document, the first line start at or after it; both ends of the document are unchanged.

    Args:
        pieces: of the document
        places: positions, ascending, in [0, length]
        length: characters of the document
    """
    found = [place if place in (0, length) else -1 for place in places]
    at = 0
    for piece in pieces:
        for i, place in enumerate(places):
            if found[i] < 0 and place - 1 < at + len(piece):
                newline = piece.find("\n", max(0, place - 1 - at))
                found[i] = at + newline + 1 if newline >= 0 else -1
        if min(found) >= 0:
            break
        at += len(piece)
    return [length if start < 0 else start for start in found]
