"""SVG elements of a picture, and pieces of it that know their height before they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

CSS = Path(__file__).with_name("picture.css")
Draw = Callable[[ET.Element, float, float], None]


@dataclass(frozen=True)
class Piece:
    """A part of a picture.

    Args:
        height: pixels
        draw: draws it into an element, with its upper left corner at x, y
    """

    height: float
    draw: Draw


def add(into: ET.Element, tag: str, cls: str = "", text: str | None = None, **attributes: object) -> ET.Element:
    """Draw an element."""
    spelt = {k.replace("_", "-"): f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
    element = ET.SubElement(into, tag, {"class": cls, **spelt} if cls else spelt)
    element.text = text
    return element


def line(into: ET.Element, cls: str, *points: tuple[float, float]) -> None:
    """A line through points."""
    add(into, "path", cls, d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points))


def stacked(pieces: Sequence[Piece], gap: float) -> Piece:
    """Pieces one below the other."""

    def draw(into: ET.Element, x: float, y: float) -> None:
        for piece in pieces:
            piece.draw(into, x, y)
            y += piece.height + gap

    return Piece(sum(piece.height for piece in pieces) + gap * max(0, len(pieces) - 1), draw)
