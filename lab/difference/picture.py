"""Two models next to each other as one standalone SVG, and below them what they cost and the settings that differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from blockwright.lab.difference import rows
from blockwright.lab.difference.difference import Difference, Pair, Side
from blockwright.lab.difference.settings import ABSENT, Entry, Name
from blockwright.lab.drawing.parts import Panel, Scheme
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.drawing.sheet import add, cut

# --- which boxes of a picture differ from the other model's -----------------------------------------------------------


Letter = Literal["a", "b"]
SAME, CHANGED, ADDED = "same", "changed", "added"
# A part of the decoder that is no block → the settings that it has.
PARTS = {
    "embedding": ("vocab_size", "d_model", "scale_embeddings"),
    "head": ("vocab_size", "d_model", "tie_embeddings", "logit_softcap"),
}
PREDICTIONS = "mtp"


def marks(found: Difference, scheme: Scheme, side: Letter) -> dict[str, str]:
    """Path of a box → its mark.

    Args:
        found: the difference of A and B
        scheme: of one of them
        side: which one it is
    """
    made = dict(_blocks(found.model, side))
    for path, keys in PARTS.items():
        differs = any(not entry.same for entry in found.model if entry.path in keys)
        made[path] = CHANGED if differs else SAME
    made |= {box.path: _of_predictions(k, found, side) for k, box in enumerate(scheme.mtp)}
    for panel in scheme.panels:
        inner = dict(_of_panel(panel, found.layers, side))
        made |= inner
        if set(inner.values()) == {SAME}:
            made[panel.path] = SAME
    return made


def _of_predictions(k: int, found: Difference, side: Letter) -> str:
    """The mark of a depth of multi-token prediction, counted from 0."""
    other = found.b if side == "a" else found.a
    if k >= len(other.model.decoder.mtp):
        return ADDED
    differing = [entry.path for entry in found.model if not entry.same and entry.path != f"{PREDICTIONS}.depth"]
    return CHANGED if any(path.partition(".")[0] == PREDICTIONS for path in differing) else SAME


def _of_panel(panel: Panel, pairs: Sequence[Pair], side: Letter) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        group = getattr(pair, side)
        if group is not None and panel.layers[0] in group.layers:
            yield from ((f"{panel.path}.{path}", mark) for path, mark in _blocks(pair.entries, side))


def _blocks(entries: Iterable[Entry], side: Letter) -> Iterator[tuple[str, str]]:
    """The blocks of one side among the entries, each with the mark of its own settings, its children's left out."""
    every = list(entries)
    names = {entry.path for entry in every if isinstance(entry.a, Name) or isinstance(entry.b, Name)}
    differing = {_block_of(entry.path, names) for entry in every if not entry.same}
    for entry in every:
        if entry.path in names and getattr(entry, side) is not ABSENT:
            lacking = entry.a is ABSENT or entry.b is ABSENT
            yield entry.path, ADDED if lacking else CHANGED if entry.path in differing else SAME


def _block_of(path: str, names: set[str]) -> str:
    """The innermost block that a setting is of: itself, if it is the name of one."""
    while path and path not in names:
        path = path.rpartition(".")[0]
    return path


CSS = Path(__file__).with_name("picture.css")
SVG = "http://www.w3.org/2000/svg"
EDGE, LINE = 12, 17.0
SIGNS = {CHANGED: "≠", ADDED: "+"}
LEGEND = "≠ and bold: it differs · + and dashed: only this model has it · grey: it is the same"


def side_by_side(found: Difference) -> str:
    """The SVG of a difference."""
    one, two = drawn(found, found.a, "a"), drawn(found, found.b, "b")
    (width, left), (other, right) = ((float(each.get("width", 0)), float(each.get("height", 0))) for each in (one, two))
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
