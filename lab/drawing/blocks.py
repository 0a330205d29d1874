"""The drawing of blocks: mixers with their children and caches, children, chips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree as ET

from blockwright.blocks.base import ORDER
from blockwright.lab.drawing import figures
from blockwright.lab.drawing.parts import Box, Cached
from blockwright.lab.drawing.sheet import BETWEEN, Piece, add, cut, flowing, lines, stacked, texts, width

TEXT, SMALL, NAME = 11.0, 10.0, 12.0  # font sizes of picture.css
PAD = 7.0  # from the edge of a box to its text
GAP = 4.0  # between children
CELLS = 16  # of equal parts that are drawn at most

Marks = Mapping[str, str]


@dataclass(frozen=True)
class Blocks:
    """Draws boxes.

    Args:
        marks: path of a box → its class, beside that of its kind
        numbers: kind and name of a block → the number of its formulas; empty without formulas
        drawn: what is drawn already of a mixer → the panel that shows it, which later ones refer to
    """

    marks: Marks
    numbers: Mapping[tuple[str, str], int] = field(default_factory=dict)
    drawn: dict[Any, str] = field(default_factory=dict)

    def numbered(self, box: Box) -> str:
        """The number of a block's formulas, behind its name."""
        number = self.numbers.get((box.kind, box.name))
        return f" ({number})" if number else ""

    def group(self, box: Box, into: ET.Element) -> ET.Element:
        """The element of a box, with its tooltip."""
        group = add(into, "g", self.marks.get(box.path, ""), data_path=box.path, data_kind=box.kind)
        group.attrib |= {"data-name": box.name, "data-written": box.written, "data-parameters": str(box.parameters)}
        summary = f": {box.summary}" if box.summary else ""
        counted = f"{BETWEEN}{box.parameters:,} parameters" if box.parameters else ""
        add(group, "title", text=f"{box.kind.replace('_', ' ')} {box.name}".strip() + summary + counted)
        return group

    def mixer(self, box: Box, room: float, panel: str) -> Piece:
        """An attention, a feed-forward or a residual block, whole where it is drawn first."""
        what = (looks(box), tuple(sorted(self._marks_in(box))))
        shown = self.drawn.setdefault(what, panel)
        if shown != panel and (box.children or box.cached):
            return self._block(box, room, [], f"as in {shown}")
        return self._block(box, room, self._inside(box, room - 2 * PAD))

    def _block(self, box: Box, room: float, inside: Sequence[Piece], note: str = "") -> Piece:
        label = lines(box.lines, room - 2 * PAD, TEXT)
        inner = stacked(inside, GAP)
        head = 19 + 14.0 * len(label)
        height = head + (inner.height + 3 if inside else 0) + 5
        count = " · ".join(filter(None, (note, figures.parameters(box.parameters) if box.parameters else "")))

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = self.group(box, into)
            add(group, "rect", f"block {box.kind}", x=x, y=y, width=room, height=height, rx=5)
            name = cut(box.name + self.numbered(box), room - 3 * PAD - width(count, SMALL), NAME, True)
            add(group, "text", "name", name, x=x + PAD, y=y + 15)
            add(group, "text", "small soft end", count, x=x + room - PAD, y=y + 15)
            texts(group, label, x + PAD, y + 29, 14)
            inner.draw(group, x + PAD, y + head + 1)

        return Piece(room, height, draw)

    def _inside(self, box: Box, room: float) -> list[Piece]:
        """Its children, the last to act uppermost, and what it caches."""
        held = [self.cached(each, room) for each in box.cached]
        return [*self._children(box, room), *([flowing(held, room, GAP)] if held else [])]

    def _children(self, box: Box, room: float) -> list[Piece]:
        order = {acts: place for place, acts in enumerate(ORDER)}
        children = sorted(box.children, key=lambda child: -order.get(child.acts, -1))
        full = [child for child in children if child.children or child.lines or child.chosen]
        chips = [self.child_chip(child, room) for child in children if child not in full]
        rows = [self.child(child, room) for child in full]
        return [*rows, *([flowing(chips, room, GAP)] if chips else [])]

    def child(self, box: Box, room: float) -> Piece:
        """A child: its name, what it acts on, its label, its own children."""
        # What a child is of the block around it
        where, inner_room = (box.acts or _slot(box)), room - 2 * PAD
        name = cut(box.name + self.numbered(box), inner_room - GAP - width(where, SMALL), TEXT)
        beside_name = cut_items(box.lines, inner_room - width(name, TEXT) - width(where, SMALL) - 14)
        label = [] if beside_name else lines(box.lines, inner_room, SMALL)
        inside = [*self._cells(box, inner_room), *self._inside(box, inner_room)]
        inner = stacked(inside, GAP)
        head = 17 + 12.5 * len(label)
        height = head + (inner.height + 4 if inside else 0) + 1

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = self.group(box, into)
            add(group, "rect", "child", x=x, y=y, width=room, height=height, rx=4)
            add(group, "text", "", name, x=x + PAD, y=y + 12.5)
            if beside_name:
                add(group, "text", "small soft", beside_name, x=x + PAD + width(name, TEXT) + 6, y=y + 12.5)
            add(group, "text", "small soft end", cut(where, inner_room, SMALL), x=x + room - PAD, y=y + 12.5)
            texts(group, label, x + PAD, y + 25, 12.5, "small soft")
            inner.draw(group, x + PAD, y + head)

        return Piece(room, height, draw)

    def _cells(self, box: Box, room: float) -> list[Piece]:
        """Equal parts of which a token uses some, as cells: the used ones are filled."""
        if box.chosen is None:
            return []
        used, all_of_them = box.chosen
        text = f"{used:,} of {all_of_them:,}"
        shown = min(all_of_them, CELLS)
        filled = min(used, shown - (shown < all_of_them))
        cell = min(11.0, (room - width(text, TEXT) - 24) / shown - 3)

        def draw(into: ET.Element, x: float, y: float) -> None:
            for i in range(shown):
                at = x + (cell + 3) * i + (10 if i >= filled and shown < all_of_them else 0)
                add(into, "rect", "on" if i < filled else "off", x=at, y=y + 1, width=cell, height=10, rx=1.5)
            add(into, "text", "", text, x=x + room - width(text, TEXT), y=y + 10)

        return [Piece(room, 13, draw)]

    def cached(self, held: Cached, room: float) -> Piece:
        """What is cached, with a hatched edge: its name and shape, how much of it is kept."""
        label = lines(figures.cached(held), room - 22 - PAD, SMALL)
        height = 12.0 * len(label) + 6
        wide = min(room, max(width(text, SMALL) for text in label) + 22 + PAD)

        def draw(into: ET.Element, x: float, y: float) -> None:
            add(into, "rect", "cached", x=x, y=y, width=wide, height=height, rx=3)
            add(into, "rect", "hatch", x=x + 1, y=y + 1, width=14, height=height - 2)
            texts(into, label, x + 21, y + 12, 12, "small")

        return Piece(wide, height, draw)

    def child_chip(self, box: Box, room: float) -> Piece:
        """A child without a label: its parameter and its name."""
        where = cut(_slot(box), 0.5 * room, SMALL)
        name = cut(box.name + self.numbered(box), 0.5 * room - 3 * PAD, SMALL)
        start = 6 + width(where, SMALL) + 5
        wide = start + width(name, SMALL) + 6

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = self.group(box, into)
            add(group, "rect", "child", x=x, y=y, width=wide, height=16, rx=8)
            add(group, "text", "small soft", where, x=x + 6, y=y + 11.5)
            add(group, "text", "small", name, x=x + start, y=y + 11.5)

        return Piece(wide, 16, draw)

    def chip(self, box: Box, room: float) -> Piece:
        """A norm, or a part of the decoder."""
        text = cut((box.name or box.kind) + self.numbered(box), room - 8, SMALL)

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = self.group(box, into)
            add(group, "rect", "block", x=x, y=y, width=room, height=19, rx=9.5)
            add(group, "text", "small mid", text, x=x + room / 2, y=y + 13)

        return Piece(room, 19, draw)

    def _marks_in(self, box: Box) -> list[tuple[str, str]]:
        inner = [mark for child in box.children for mark in self._marks_in(child)]
        return [(box.kind, self.marks.get(box.path, "")), *inner]


def cut_items(items: Sequence[str], room: float) -> str:
    """All items in one line; "" where they do not fit."""
    joined = " · ".join(items)
    return joined if width(joined, SMALL) <= room else ""


def _slot(box: Box) -> str:
    """The parameter that a child is for."""
    return box.slot.partition(".")[0].replace("_", " ")


def looks(box: Box) -> Any:
    """What is drawn of a box, wherever it is."""
    return box.kind, box.name, box.lines, box.acts, box.chosen, box.cached, tuple(map(looks, box.children))
