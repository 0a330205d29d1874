"""A scheme as one standalone SVG: the stack to the left, a panel for each distinct layer to the right, bottom to top.

Panels are laid by a fixed grammar, so there is nothing to route. Colours are in picture.css, for light and dark; what
is cached is hatched as well as coloured, as in DeepSeek-V2's Figure 3. Of mixers that several panels share, the
uppermost shows the inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from xml.etree import ElementTree as ET

from blockwright.lab.drawing import figures
from blockwright.lab.drawing.blocks import NAME, SMALL, Blocks, Marks
from blockwright.lab.drawing.boxes import box
from blockwright.lab.drawing.parts import Box, Branch, Panel, Run, Scheme
from blockwright.lab.drawing.sheet import Piece, add, cut, line, lines, stacked, texts, width
from blockwright.registry.recording import recorded

# --- what pictures of models and of single blocks share: the sheet, and the list of formulas --------------------------


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


# --- the picture of a model -------------------------------------------------------------------------------------------

STACK = 78.0  # width of the stack
GUTTER = 14.0  # from the stack to the panels
LEAST = 8.0  # between pieces
STREAMS = 4  # drawn at most


def picture(scheme: Scheme, marks: Marks | None = None, equations: bool = False) -> str:
    """The SVG of a scheme.

    Args:
        scheme: of a model
        marks: path of a box → ``same``, ``changed`` or ``added``
        equations: whether the formulas of its blocks are below it
    """
    boxes = with_formulas(scheme.boxes()) if equations else []
    return Picture(scheme, Blocks(marks or {}, numbers(boxes)), boxes).svg()


@dataclass(frozen=True)
class Picture:
    """A picture in the making."""

    scheme: Scheme
    blocks: Blocks
    formulas: Sequence[Box] = ()

    def svg(self) -> str:
        left = EDGE + STACK + GUTTER
        room = WIDTH - EDGE - left
        layers = [self.panel(panel, room) for panel in reversed(self.scheme.panels)]
        panels = stacked([*layers, *(self.blocks.mixer(box, room, box.kind) for box in self.scheme.beside)], 12)
        stack, head = self.stack(), self.header(WIDTH - 2 * EDGE)
        top = EDGE + head.height + 14
        below = top + max(panels.height, stack.height) + EDGE
        formulas = listed(self.formulas, self.blocks, WIDTH - 2 * EDGE)
        root = framed(self.scheme.title or "A model", below + (formulas.height + EDGE if self.formulas else 0))
        for name, figure in asdict(self.scheme.totals).items():
            root.set(f"data-{name.replace('_', '-')}", str(figure))
        head.draw(root, EDGE, EDGE)
        stack.draw(root, EDGE, top)
        panels.draw(root, left, top)
        formulas.draw(root, EDGE, below)
        return ET.tostring(root, encoding="unicode") + "\n"

    def header(self, room: float) -> Piece:
        """The name of the model, its sizes and its figures."""
        columns, each = figures.totals(self.scheme.totals), room / 4
        sizes = lines(figures.sizes(self.scheme), room, SMALL)
        about = [lines([of], each - 4, SMALL) for _, of in columns]
        top = 21.0 + 12.5 * len(sizes)

        def draw(into: ET.Element, x: float, y: float) -> None:
            add(into, "text", "title", cut(self.scheme.title, room, 17, True), x=x, y=y + 15)
            texts(into, sizes, x, y + 30, 12.5, "small soft")
            for i, (value, _) in enumerate(columns):
                at = x + each * i
                add(into, "text", "figure", cut(value, each - 4, 13, True), x=at, y=y + top + 19)
                if i == len(columns) - 1:  # the key to what is hatched
                    start = at + width(value, 13, True) + 6
                    add(into, "rect", "cached", x=start, y=y + top + 10, width=14, height=10, rx=2)
                    add(into, "rect", "hatch", x=start + 1, y=y + top + 11, width=12, height=8)
                texts(into, about[i], at, y + top + 32, 12, "small soft")

        return Piece(room, top + 11 + 12 * max(map(len, about)), draw)

    # --- panels ---

    def panel(self, panel: Panel, room: float) -> Piece:
        """A distinct layer, with its residual streams to the left."""
        streams = max(1, min(panel.streams, STREAMS))
        indent = 24.0 + 4.0 * (streams - 1)
        inner = room - indent - 10
        about = lines(figures.of_layer(panel), room - 44, SMALL)
        top = 26.0 + 12.5 * len(about)
        pieces = [self.branch(panel, branch, inner, streams) for branch in reversed(panel.branches)]
        # The residual block, if it does more than to add
        used = {slot for b in panel.branches for slot in (b.before, b.after, b.beyond)}
        rest = tuple(child for child in panel.residual.children if child.slot not in used)
        own = replace(panel.residual, children=rest)
        plain = not rest and panel.streams == 1
        connections = [self.blocks.child_chip(own, inner) if plain else self.blocks.mixer(own, inner, panel.name)]
        body = stacked([*connections, *pieces], LEAST)
        height = top + 8 + body.height + 12

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = add(into, "g", self.blocks.marks.get(panel.path, ""), data_path=panel.path)
            add(group, "title", text=figures.layers(panel))
            add(group, "rect", "panel", x=x, y=y, width=room, height=height, rx=8)
            self.badge(group, panel.name, x + 17, y + 18)
            times = f"× {len(panel.layers)}"
            name = cut(figures.layers(panel), room - 56 - width(times, NAME, True), NAME, True)
            add(group, "text", "name", name, x=x + 32, y=y + 22)
            add(group, "text", "name end", times, x=x + room - 10, y=y + 22)
            texts(group, about, x + 32, y + 36, 12.5, "small soft")
            for i in range(streams):
                line(group, "stream", (x + 12 + 4.0 * i, y + height), (x + 12 + 4.0 * i, y + top))
            add(group, "path", "arrow", d=f"M{x + 8 + 2.0 * (streams - 1):g},{y + top + 4:g}l4,-7l4,7z")
            body.draw(group, x + indent, y + top + 8)

        return Piece(room, height, draw)

    def branch(self, panel: Panel, branch: Branch, room: float, streams: int) -> Piece:
        """Mixers between norms, and the sum with the stream."""
        norms = {child.slot: child for child in panel.residual.children}
        shown = [box for box in (getattr(panel, name) for name in branch.mixers) if not box.empty]
        if not shown:
            return Piece(0, 0, lambda into, x, y: None)
        chip = self.blocks.chip
        pieces = [
            *([chip(norms[branch.after], room)] if branch.after else []),
            *(self.blocks.mixer(box, room, panel.name) for box in reversed(shown)),
            *([chip(norms[branch.before], room)] if branch.before else []),
        ]
        beyond = [chip(norms[branch.beyond], room)] if branch.beyond else []
        body = stacked(pieces, LEAST)
        above = sum(piece.height + LEAST for piece in beyond)
        height = above + 14 + body.height + 12

        def draw(into: ET.Element, x: float, y: float) -> None:
            nearest, join, fork = x - 12, y + above + 6, y + height - 4
            far, middle = nearest - 4.0 * (streams - 1), x + room / 2
            stacked(beyond, LEAST).draw(into, x, y)
            line(into, "wire", (far, fork), (middle, fork), (middle, join), (nearest + 5, join))
            add(into, "path", "arrow", d=f"M{nearest + 5:g},{join:g}l6,-3.5l0,7z")
            wide = nearest - far + 11
            add(into, "rect", "sum", x=far - 5.5, y=join - 5.5, width=wide, height=11, rx=5.5)
            at = (far + nearest) / 2
            line(into, "wire", (at - 3, join), (at + 3, join))
            line(into, "wire", (at, join - 3), (at, join + 3))
            body.draw(into, x, y + above + 14)

        return Piece(room, height, draw)

    def badge(self, into: ET.Element, name: str, x: float, y: float) -> None:
        """The letter of a panel."""
        add(into, "circle", "badge", cx=x, cy=y, r=9)
        add(into, "text", "small letter", name, x=x, y=y + 3.6)

    # --- the stack ---

    def stack(self) -> Piece:
        """From the tokens at the bottom to the head at the top."""
        scheme, chip = self.scheme, self.blocks.chip
        above = [*reversed(scheme.mtp), scheme.head, scheme.norm]
        below = [*([scheme.position] if scheme.position else []), scheme.embedding]
        pieces = [
            *(chip(box, STACK) for box in above),
            *(self.run(run) for run in reversed(scheme.stack)),
            *(chip(box, STACK) for box in below),
            *(self._plug(box.kind) for box in scheme.inputs),
        ]
        body = stacked(pieces, LEAST + 2)

        def draw(into: ET.Element, x: float, y: float) -> None:
            line(into, "stream", (x + STACK / 2, y + 10), (x + STACK / 2, y + body.height - 10))
            body.draw(into, x, y)

        return Piece(STACK, body.height, draw)

    def _plug(self, kind: str) -> Piece:
        """Where an input enters, whose box is beside the stack."""

        def draw(into: ET.Element, x: float, y: float) -> None:
            add(into, "rect", "input", x=x, y=y, width=STACK, height=19, rx=9.5)
            add(into, "text", "small mid", cut(kind, STACK - 8, SMALL), x=x + STACK / 2, y=y + 13)

        return Piece(STACK, 19, draw)

    def run(self, run: Run) -> Piece:
        """Panels that follow each other, and how many times."""
        parts = _runs(run.panels)
        each = 24.0
        height = each * len(parts) + (18 if run.times > 1 else 0)

        def draw(into: ET.Element, x: float, y: float) -> None:
            add(into, "rect", "block", x=x, y=y, width=STACK, height=height, rx=5)
            if run.times > 1:
                add(into, "text", "name mid", f"× {run.times}", x=x + STACK / 2, y=y + 16)
            top = y + height - each * len(parts)
            for i, (name, times) in enumerate(reversed(parts)):
                repeats = f"× {times}" if times > 1 else ""
                middle = x + STACK / 2 - (14 if repeats else 0)
                self.badge(into, name, middle, top + each * i + 12)
                add(into, "text", "small", repeats, x=middle + 14, y=top + each * i + 15.5)

        return Piece(STACK, height, draw)


def _runs(names: Sequence[str]) -> list[tuple[str, int]]:
    """Equal names in a row, and how many they are."""
    found = list[tuple[str, int]]()
    for name in names:
        if found and found[-1][0] == name:
            found[-1] = name, found[-1][1] + 1
        else:
            found.append((name, 1))
    return found


# --- a block by itself: the box that it has in a small decoder, with what the catalogue says of it --------------------


def alone(kind: str, name: str) -> Box:
    """The box of a registered block, in the small decoder of the catalogue, which has its default values.

    Raises:
        ConfigError: no small decoder has a place for it
    """
    from blockwright.lab.abilities import host  # which loads every kind; a model's picture needs none

    with recorded() as records:
        _, block = host(kind, name)
    return box(block, kind, kind, records)


def block_picture(of: Box, equations: bool = False) -> str:
    """The SVG of a block alone."""
    from blockwright.lab.abilities import D_MODEL

    boxes = with_formulas(of.walk()) if equations else []
    blocks = Blocks({}, numbers(boxes))
    room = WIDTH - 2 * EDGE
    pieces = stacked([blocks.mixer(of, room, ""), listed(boxes, blocks, room)], EDGE)
    root = framed(f"{of.kind}/{of.name}", pieces.height + 2 * EDGE + 22)
    add(root, "text", "title", f"{of.kind}/{of.name}", x=EDGE, y=EDGE + 15)
    add(root, "text", "small soft end", f"at d_model {D_MODEL}", x=WIDTH - EDGE, y=EDGE + 15)
    pieces.draw(root, EDGE, EDGE + 26)
    return ET.tostring(root, encoding="unicode") + "\n"
