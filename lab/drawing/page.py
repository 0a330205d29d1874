"""What pictures of models and of single blocks share: the sheet, and the list of formulas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from blockwright.lab.drawing.blocks import SMALL, Blocks
from blockwright.lab.drawing.letters import lines
from blockwright.lab.drawing.parts import Box
from blockwright.lab.drawing.sheet import Piece, add, stacked, texts

WIDTH = 420.0  # pixels: a phone, or the column of a paper
EDGE = 12.0  # from the edge of the sheet
NAMES = 100.0  # width of the column of names beside formulas
CSS = Path(__file__).with_name("picture.css")


def framed(title: str, height: float) -> ET.Element:
    """An SVG of this height, with styles and an empty sheet."""
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "scheme", "role": "img"})
    root.attrib |= {"viewBox": f"0 0 {WIDTH:g} {height:g}", "width": f"{WIDTH:g}", "height": f"{height:g}"}
    add(root, "title", text=title)
    add(root, "style").text = CSS.read_text()
    pattern = add(add(root, "defs"), "pattern", id="bw-hatch", width=5, height=5, patternUnits="userSpaceOnUse")
    pattern.set("patternTransform", "rotate(45)")
    add(pattern, "line", "stroke", x1=1, y1=0, x2=1, y2=5)
    add(root, "rect", "sheet", width=WIDTH, height=height)
    return root


def with_formulas(boxes: Iterable[Box]) -> list[Box]:
    """One of each block among these that has formulas, in their order."""
    found = (box for box in boxes if box.equations and not box.empty)
    return list({(box.kind, box.name): box for box in found}.values())


def numbers(boxes: Sequence[Box]) -> dict[tuple[str, str], int]:
    """Kind and name of blocks → the numbers of their formulas."""
    return {(box.kind, box.name): number for number, box in enumerate(boxes, start=1)}


def listed(boxes: Sequence[Box], blocks: Blocks, room: float) -> Piece:
    """The formulas of blocks, with the numbers that the picture refers to."""
    return stacked([_formulas(box, blocks, room) for box in boxes], 5)


def _formulas(box: Box, blocks: Blocks, room: float) -> Piece:
    label = lines([f"({blocks.numbers[box.kind, box.name]}) {box.name}"], NAMES - 4, SMALL)
    written = [text for formula in box.equations for text in lines([formula], room - NAMES, SMALL)]

    def draw(into: ET.Element, x: float, y: float) -> None:
        group = add(into, "g", data_equations=f"{box.kind}/{box.name}")
        texts(group, label, x, y + 10, 13.5, "small soft")
        texts(group, written, x + NAMES, y + 10, 13.5, "small")

    return Piece(room, 13.5 * max(len(label), len(written)), draw)
