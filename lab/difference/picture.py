"""Two models next to each other as one standalone SVG, and below them what they cost and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from blockwright.lab.difference import rows
from blockwright.lab.difference.difference import Difference, Side
from blockwright.lab.difference.marks import ADDED, CHANGED, SAME, Letter, marks
from blockwright.lab.drawing.letters import cut
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.drawing.sheet import add

CSS = Path(__file__).with_name("picture.css")
SVG = "http://www.w3.org/2000/svg"
EDGE, LINE = 12, 17.0
SIGNS = {CHANGED: "≠", ADDED: "+"}
LEGEND = "≠ and bold: it differs · + and dashed: only this model has it · grey: it is the same"


def side_by_side(found: Difference) -> str:
    """The SVG of a difference."""
    one, two = drawn(found, found.a, "a"), drawn(found, found.b, "b")
    (width, left), (other, right) = (_size(each) for each in (one, two))
    whole, top = width + other, max(left, right)
    shown = [*rows.costs(found), *rows.differing(found)]
    height = top + LINE * (len(shown) + 3) + EDGE
    title = f"{found.a.name} and {found.b.name}"
    root = ET.Element("svg", {"xmlns": SVG, "class": "scheme", "role": "img", "viewBox": f"0 0 {whole:g} {height:g}"})
    root.attrib |= {"width": f"{whole:g}", "height": f"{height:g}"}
    add(root, "title", text=title)
    add(root, "style").text = one.findtext("style", "") + CSS.read_text()
    add(root, "rect", "sheet", width=whole, height=height)
    for each, x, letter in ((one, 0, "a"), (two, width, "b")):
        place = add(root, "g", transform=f"translate({x:g} 0)", data_side=letter)
        place.extend(part for part in each if part.tag not in ("title", "style"))
    _table(root, found, shown, whole, top + LINE)
    return ET.tostring(root, encoding="unicode") + "\n"


def drawn(found: Difference, side: Side, letter: Letter) -> ET.Element:
    """The picture of one model, with signs next to the colours; its names have no namespace."""
    whole = scheme(side.model.decoder, side.name)
    root = ET.fromstring(picture(whole, marks(found, whole, letter)).replace(f' xmlns="{SVG}"', "", 1))
    for group in root.iter("g"):
        frame = group.find("rect")
        mark = group.get("class", "")
        if frame is not None and mark in (SAME, *SIGNS):
            frame.set("class", f"{frame.get('class')} {mark}-frame")
        if (sign := SIGNS.get(mark)) and frame is not None:
            add(group, "text", "sign", sign, x=float(frame.get("x", 0)), y=float(frame.get("y", 0)) + 5)
    return root


def _size(drawn: ET.Element) -> tuple[float, float]:
    return float(drawn.get("width", 0)), float(drawn.get("height", 0))


def _table(root: ET.Element, found: Difference, shown: Sequence[rows.Row], width: float, y: float) -> None:
    """Rows of a label, A, B and the change."""
    add(root, "text", "small soft", LEGEND, x=EDGE, y=y)
    ends = (0.6 * width, 0.85 * width, width - EDGE)
    for row in [("", "", found.a.name, found.b.name, ""), *shown]:
        y += LINE
        sign, label, *values = row
        add(root, "text", "", f"{sign} {label.strip()}".strip(), x=EDGE, y=y)
        for end, value in zip(ends, values, strict=True):
            add(root, "text", "end" if sign else "end name", cut(value, 0.24 * width, 11.0), x=end, y=y)
        add(root, "line", "row", x1=EDGE, x2=width - EDGE, y1=y + 4.5, y2=y + 4.5)
