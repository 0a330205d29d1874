"""A block by itself: the box that it has in a small decoder, with what the catalogue says of it."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from blockwright.lab.abilities import D_MODEL, host
from blockwright.lab.drawing.blocks import Blocks
from blockwright.lab.drawing.boxes import box
from blockwright.lab.drawing.page import EDGE, WIDTH, framed, listed, numbers, with_formulas
from blockwright.lab.drawing.parts import Box
from blockwright.lab.drawing.sheet import add, stacked
from blockwright.registry.recording import recorded


def alone(kind: str, name: str) -> Box:
    """The box of a registered block, in the small decoder of the catalogue, which has its default values.

    Raises:
        ConfigError: no small decoder has a place for it
    """
    with recorded() as records:
        _, block = host(kind, name)
    return box(block, kind, kind, records)


def block_picture(of: Box, equations: bool = False) -> str:
    """The SVG of a block alone."""
    boxes = with_formulas(of.walk()) if equations else []
    blocks = Blocks({}, numbers(boxes))
    room = WIDTH - 2 * EDGE
    pieces = stacked([blocks.mixer(of, room, ""), listed(boxes, blocks, room)], EDGE)
    root = framed(f"{of.kind}/{of.name}", pieces.height + 2 * EDGE + 22)
    add(root, "text", "title", f"{of.kind}/{of.name}", x=EDGE, y=EDGE + 15)
    add(root, "text", "small soft end", f"at d_model {D_MODEL}", x=WIDTH - EDGE, y=EDGE + 15)
    pieces.draw(root, EDGE, EDGE + 26)
    return ET.tostring(root, encoding="unicode") + "\n"
