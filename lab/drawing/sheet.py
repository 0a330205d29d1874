"""SVG elements of a picture, and pieces of it that know their size before they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

# --- letters that can be shown, and widths of text --------------------------------------------------------------------


# Advance widths of DejaVu Sans in em, which is among the widest of the fonts that systems choose.
_ADVANCES = {
    0.29: "'ijlIJ",
    0.34: " ,.·/:;\\|",
    0.4: "f-()[]t!²₁₂ₙ",
    0.46: 'r"',
    0.53: "*_`–sz?",
    0.58: "cLFk",
    0.64: "vxyγλPTYaoδθeESbdghnpquσΣ$0123456789{}β√",
    0.7: "KαAVΔBRXZC",
    0.79: "UHNDG&OQ",
    0.86: "w∞#+<=>^~×≤≥−←→M",
}
_WIDTHS = {letter: width for width, letters in _ADVANCES.items() for letter in letters}
WIDEST = 1.0  # of any other letter
BOLD = 1.12
BETWEEN = " · "


def clean(text: str) -> str:
    """A text without characters that would move a cursor, or that XML has not: names of files may have any."""
    return "".join(c if c.isprintable() else "·" for c in text)


def width(text: str, size: float, bold: bool = False) -> float:
    """Pixels of a text, at most, at a font size in pixels."""
    return sum(_WIDTHS.get(letter, WIDEST) for letter in text) * size * (BOLD if bold else 1)


def lines(items: Iterable[str], room: float, size: float, between: str = BETWEEN) -> list[str]:
    """Items joined into lines that fit into the room; an item that does not fit is broken at spaces, or cut."""
    found: list[str] = []
    for item in items:
        joined = f"{found[-1]}{between}{item}" if found else item
        if found and width(joined, size) <= room:
            found[-1] = joined
        else:
            found += _broken(item, room, size)
    return found


def _broken(text: str, room: float, size: float) -> list[str]:
    if width(text, size) <= room:
        return [text]
    words = text.split(" ")
    if len(words) == 1:
        return [cut(text, room, size)]
    return lines(words, room, size, " ")


def cut(text: str, room: float, size: float, bold: bool = False) -> str:
    """A text shortened in the middle until it fits."""
    if width(text, size, bold) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        tail = kept // 3
        short = f"{text[: kept - tail]}…{text[len(text) - tail :]}"
        if width(short, size, bold) <= room:
            return short
    return "…"


def widest(texts: Sequence[str], size: float, bold: bool = False) -> float:
    """Pixels of the widest of some texts."""
    return max((width(text, size, bold) for text in texts), default=0.0)


Draw = Callable[[ET.Element, float, float], None]


@dataclass(frozen=True)
class Piece:
    """A part of a picture.

    Args:
        width, height: pixels
        draw: draws it into an element, with its upper left corner at x, y
    """

    width: float
    height: float
    draw: Draw


def add(into: ET.Element, tag: str, cls: str = "", text: str | None = None, **attributes: object) -> ET.Element:
    """Draw an element."""
    spelt = {k.replace("_", "-"): f"{v:g}" if isinstance(v, float) else clean(str(v)) for k, v in attributes.items()}
    element = ET.SubElement(into, tag, {"class": cls, **spelt} if cls else spelt)
    element.text = None if text is None else clean(text)
    return element


def line(into: ET.Element, cls: str, *points: tuple[float, float]) -> None:
    """A line through points."""
    add(into, "path", cls, d="M" + "L".join(f"{x:g},{y:g}" for x, y in points))


def texts(into: ET.Element, lines: Sequence[str], x: float, y: float, step: float, cls: str = "") -> None:
    """Lines of text, the first with its baseline at y."""
    for i, text in enumerate(lines):
        add(into, "text", cls, text, x=x, y=y + step * i)


def stacked(pieces: Sequence[Piece], gap: float) -> Piece:
    """Pieces one below the other."""

    def draw(into: ET.Element, x: float, y: float) -> None:
        for piece in pieces:
            piece.draw(into, x, y)
            y += piece.height + gap

    height = sum(piece.height for piece in pieces) + gap * max(0, len(pieces) - 1)
    return Piece(max((piece.width for piece in pieces), default=0), height, draw)


def beside(pieces: Sequence[Piece], gap: float) -> Piece:
    """Pieces side by side."""

    def draw(into: ET.Element, x: float, y: float) -> None:
        for piece in pieces:
            piece.draw(into, x, y)
            x += piece.width + gap

    width = sum(piece.width for piece in pieces) + gap * max(0, len(pieces) - 1)
    return Piece(width, max((piece.height for piece in pieces), default=0), draw)


def flowing(pieces: Sequence[Piece], room: float, gap: float) -> Piece:
    """Pieces side by side in as many rows as they need."""
    rows = list[list[Piece]]()
    for piece in pieces:
        if rows and beside([*rows[-1], piece], gap).width <= room:
            rows[-1].append(piece)
        else:
            rows.append([piece])
    return stacked([beside(row, gap) for row in rows], gap)
