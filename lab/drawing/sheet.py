"""SVG elements of a picture, and pieces of it that know their size before they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from blockwright.lab.drawing.letters import clean

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
