"""A scheme as one standalone SVG: the stack to the left, a panel for each distinct layer to the right, bottom to top.

Panels are laid by a fixed grammar, so there is nothing to route. Colours are in picture.css, for light and dark; what
is cached is hatched as well as coloured, as in DeepSeek-V2's Figure 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree as ET

from blockwright.lab.card import scaled
from blockwright.lab.drawing.labels import in_letters, shape
from blockwright.lab.drawing.letters import cut, lines
from blockwright.lab.drawing.parts import Box, Cached, Panel, Scheme
from blockwright.lab.drawing.sheet import CSS, Piece, add, line, stacked
from blockwright.lab.drawing.wiring import Branch

WIDTH = 420  # pixels: a phone, or the column of a paper
EDGE = 12
STACK = 96  # width of the stack
LEAST = 8  # between pieces
TEXT, SMALL, NAME = 11.0, 10.0, 12.0  # font sizes of picture.css
LINE = 14.0
PAD = 7.0
STREAM = 16.0  # from the panel's edge to the residual stream
Marks = Mapping[str, str]


def picture(scheme: Scheme, marks: Marks | None = None, equations: bool = False) -> str:
    """The SVG of a scheme.

    Args:
        scheme: of a model
        marks: path of a box → ``same``, ``changed`` or ``added``
        equations: whether the formulas of its blocks are below it
    """
    return Picture(scheme, marks or {}).svg()


@dataclass(frozen=True)
class Picture:
    """A picture in the making."""

    scheme: Scheme
    marks: Marks

    def svg(self) -> str:
        top = 40.0
        x = EDGE + STACK + 14.0
        panels = stacked([self.panel(p, WIDTH - EDGE - x) for p in reversed(self.scheme.panels)], 12)
        stack = stacked([self.stack(), self.figures()], 18)
        height = top + max(panels.height, stack.height) + EDGE
        root = self._root(height)
        add(root, "text", "title", cut(self.scheme.title, WIDTH - 2 * EDGE, 17, True), x=EDGE, y=26)
        stack.draw(root, EDGE, top)
        panels.draw(root, x, top)
        return ET.tostring(root, encoding="unicode") + "\n"

    def _root(self, height: float) -> ET.Element:
        figures = self.scheme.totals
        root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "scheme", "role": "img"})
        root.attrib |= {"viewBox": f"0 0 {WIDTH} {height:g}", "width": str(WIDTH), "height": f"{height:g}"}
        for name in ("parameters", "active", "context", "forward_flops", "training_flops", "cache_numbers"):
            root.set(f"data-{name.replace('_', '-')}", str(getattr(figures, name)))
        root.set("data-cache-bytes", str(figures.cache_bytes))
        add(root, "title", text=self.scheme.title)
        add(root, "style", text=CSS.read_text())
        definitions = add(root, "defs")
        pattern = add(definitions, "pattern", id="bw-hatch", width=6, height=6, patternUnits="userSpaceOnUse")
        pattern.set("patternTransform", "rotate(45)")
        add(pattern, "rect", "hatch", width=6, height=6)
        add(pattern, "line", "stroke", x1=0, y1=0, x2=0, y2=6)
        add(root, "rect", "sheet", width=WIDTH, height=height)
        return root

    # --- boxes ---

    def group(self, box: Box, into: ET.Element) -> ET.Element:
        group = add(into, "g", self.marks.get(box.path, ""), data_path=box.path, data_kind=box.kind)
        group.attrib |= {"data-name": box.name, "data-written": box.written, "data-parameters": str(box.parameters)}
        summary = f": {box.summary}" if box.summary else ""
        counted = f"\n{box.parameters:,} parameters" if box.parameters else ""
        add(group, "title", text=f"{box.kind} {box.name}".strip() + summary + counted)
        return group

    def block(self, box: Box, width: float) -> Piece:
        """A mixer: its name, its label, its children, what it caches."""
        label = lines(box.lines, width - 2 * PAD, TEXT)
        children = [self.child(child, width - 2 * PAD) for child in reversed(box.children)]
        held = [self.cached(each, width - 2 * PAD) for each in box.cached]
        inner = stacked([*children, *held], 4)
        head = 18 + LINE * len(label)
        height = head + (inner.height + 4 if children or held else 0) + PAD

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = self.group(box, into)
            add(group, "rect", f"block {box.kind}", x=x, y=y, width=width, height=height, rx=5)
            count = in_letters(box.parameters) if box.parameters else ""
            add(group, "text", "name", cut(box.name, width - 70, NAME, True), x=x + PAD, y=y + 15)
            add(group, "text", "small soft end", count, x=x + width - PAD, y=y + 15)
            self._lines(group, label, x + PAD, y + 29)
            inner.draw(group, x + PAD, y + head + 2)

        return Piece(height, draw)

    def child(self, box: Box, width: float) -> Piece:
        """A child: its name and where it acts, its label, its children."""
        where = box.acts or box.slot.partition(".")[0].replace("_", " ")
        name_room, where_room = 0.55 * (width - 2 * PAD), 0.43 * (width - 2 * PAD)
        label = lines(box.lines, width - 2 * PAD, SMALL)
        inner = stacked([self.child(each, width - 2 * PAD) for each in reversed(box.children)], 3)
        head = 16 + 12 * len(label)
        height = head + (inner.height + 4 if box.children else 0) + 2

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = self.group(box, into)
            add(group, "rect", "child", x=x, y=y, width=width, height=height, rx=4)
            add(group, "text", "", cut(box.name, name_room, TEXT), x=x + PAD, y=y + 12)
            add(group, "text", "small soft end", cut(where, where_room, SMALL), x=x + width - PAD, y=y + 12)
            self._lines(group, label, x + PAD, y + 24, "small soft", 12)
            inner.draw(group, x + PAD, y + head)

        return Piece(height, draw)

    def cached(self, held: Cached, width: float) -> Piece:
        """What is cached: hatched, its name and shape, how much of it is kept."""
        text = lines(shape(held), width - 2 * PAD - 8, SMALL)
        height = 12.0 * len(text) + 7

        def draw(into: ET.Element, x: float, y: float) -> None:
            add(into, "rect", "cached", x=x, y=y, width=width, height=height, rx=3)
            add(into, "rect", "plate", x=x + 5, y=y + 2.5, width=width - 10, height=height - 5, rx=2)
            self._lines(into, text, x + PAD + 2, y + 12.5, "small", 12)

        return Piece(height, draw)

    def chip(self, box: Box, width: float) -> Piece:
        """A norm, or a part of the decoder."""

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = self.group(box, into)
            add(group, "rect", "block", x=x, y=y, width=width, height=19, rx=9)
            add(group, "text", "small mid", cut(box.name or box.kind, width - 12, SMALL), x=x + width / 2, y=y + 13)

        return Piece(19, draw)

    def _lines(
        self, into: ET.Element, texts: Sequence[str], x: float, y: float, cls: str = "", step: float = LINE
    ) -> None:
        for i, text in enumerate(texts):
            add(into, "text", cls, text, x=x, y=y + step * i)

    # --- panels ---

    def panel(self, panel: Panel, width: float) -> Piece:
        """A distinct layer, with its residual stream to the left."""
        inner = width - STREAM * 2 - 8
        connections = self._connections(panel, inner)
        pieces = [self.branch(panel, branch, inner) for branch in reversed(panel.branches)]
        body = stacked([*connections, *pieces], LEAST)
        height = 44 + body.height + 18

        def draw(into: ET.Element, x: float, y: float) -> None:
            group = add(into, "g", self.marks.get(panel.path, ""), data_path=panel.path)
            add(group, "title", text=f"layers {spans(panel.layers)}")
            add(group, "rect", "panel", x=x, y=y, width=width, height=height, rx=8)
            self._badge(group, panel.name, x + 16, y + 17)
            times = f"{len(panel.layers)} ×"
            layers = f"layer{'s' if len(panel.layers) > 1 else ''} {spans(panel.layers)}"
            add(group, "text", "name", cut(layers, width - 90, NAME, True), x=x + 32, y=y + 21)
            add(group, "text", "name end", times, x=x + width - 10, y=y + 21)
            counted = f"{in_letters(panel.parameters)} parameters each"
            add(group, "text", "small soft", counted, x=x + 32, y=y + 35)
            for i in range(max(1, min(panel.streams, 4))):
                at = x + STREAM - 3.0 * i
                line(group, "stream", (at, y + height), (at, y + 44))
            body.draw(group, x + STREAM * 2, y + 44)

        return Piece(height, draw)

    def _connections(self, panel: Panel, width: float) -> list[Piece]:
        """The residual block, if it does more than to add."""
        used = {slot for b in panel.branches for slot in (b.before, b.after, b.beyond)}
        rest = [child for child in panel.residual.children if child.slot not in used]
        if not rest and panel.streams == 1:
            return []
        own = [*panel.residual.lines, *([f"{panel.streams} streams"] if panel.streams > 1 else [])]
        return [self.block(replace(panel.residual, lines=tuple(own), children=tuple(rest)), width)]

    def branch(self, panel: Panel, branch: Branch, width: float) -> Piece:
        """Mixers between norms, and the sum with the stream."""
        norms = {child.slot: child for child in panel.residual.children}
        mixers = [getattr(panel, name) for name in branch.mixers]
        shown = [box for box in mixers if not box.empty]
        if not shown:
            return Piece(0, lambda into, x, y: None)
        pieces = [
            *([self.chip(norms[branch.after], width)] if branch.after else []),
            *(self.block(box, width) for box in reversed(shown)),
            *([self.chip(norms[branch.before], width)] if branch.before else []),
        ]
        beyond = [self.chip(norms[branch.beyond], width)] if branch.beyond else []
        body = stacked(pieces, LEAST)
        above = sum(piece.height + LEAST for piece in beyond)
        height = above + 12 + body.height + 12

        def draw(into: ET.Element, x: float, y: float) -> None:
            stream, middle, join = x - STREAM, x + 24, y + above + 6
            stacked(beyond, LEAST).draw(into, x, y)
            line(into, "wire", (stream, y + height - 4), (middle, y + height - 4), (middle, join), (stream + 6, join))
            add(into, "circle", "sum", cx=stream, cy=join, r=5.5)
            line(into, "wire", (stream - 3, join), (stream + 3, join))
            line(into, "wire", (stream, join - 3), (stream, join + 3))
            body.draw(into, x, y + above + 12)

        return Piece(height, draw)

    def _badge(self, into: ET.Element, name: str, x: float, y: float) -> None:
        add(into, "circle", "badge", cx=x, cy=y, r=8.5)
        add(into, "text", "small letter", name, x=x, y=y + 3.6)

    # --- the stack ---

    def stack(self) -> Piece:
        """From the tokens at the bottom to the head at the top."""
        scheme = self.scheme
        runs = [self.run(run.panels, run.times) for run in reversed(scheme.stack)]
        ends = [self.chip(box, STACK) for box in (scheme.head, scheme.norm)]
        start = [*([scheme.position] if scheme.position else []), scheme.embedding, *scheme.inputs]
        return stacked(
            [*(self.chip(depth, STACK) for depth in reversed(scheme.mtp)), *ends, *runs]
            + [self.chip(box, STACK) for box in start],
            LEAST,
        )

    def run(self, panels: Sequence[str], times: int) -> Piece:
        each = 24.0
        height = each * len(panels)

        def draw(into: ET.Element, x: float, y: float) -> None:
            add(into, "rect", "block", x=x, y=y, width=STACK, height=height, rx=5)
            for i, name in enumerate(reversed(panels)):
                self._badge(into, name, x + 16, y + each * i + 12)
            add(into, "text", "name end", f"× {times}", x=x + STACK - 10, y=y + height / 2 + 4)

        return Piece(height, draw)

    def figures(self) -> Piece:
        """Parameters, FLOPs and cache of the whole."""
        totals = self.scheme.totals
        rows = [
            ("parameters", in_letters(totals.parameters)),
            ("active a token", in_letters(totals.active)),
            (f"FLOPs a token, {totals.context:,}", scaled(totals.forward_flops)),
        ]
        if totals.cache_bytes is not None:
            rows.append(("cache a token, bf16", f"{totals.cache_bytes:,} B"))

        def draw(into: ET.Element, x: float, y: float) -> None:
            for i, (name, value) in enumerate(rows):
                add(into, "text", "small soft", name, x=x, y=y + 34 * i + 10)
                add(into, "text", "name", value, x=x, y=y + 34 * i + 24)

        return Piece(34.0 * len(rows), draw)


def spans(indices: Sequence[int]) -> str:
    """Layers as ranges: 0–2, 4, 6–9; shortened where they are many."""
    ranges = list[list[int]]()
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    texts = [str(a) if a == b else f"{a}–{b}" for a, b in ranges]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:3], "…", texts[-1]])
