"""A scheme as text for a terminal, bottom to top as the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from blockwright.lab.drawing import figures
from blockwright.lab.drawing.blocks import looks
from blockwright.lab.drawing.parts import Box, Branch, Panel, Run, Scheme
from blockwright.lab.drawing.sheet import BETWEEN, clean

WIDTH = 78  # columns
# Of an encoding without them.
ASCII = str.maketrans(
    {
        "┌": "+", "┐": "+", "└": "+", "┘": "+", "─": "-", "│": "|", "▒": "#", "⊕": "+", "▲": "^",
        "×": "x", "·": ",", "–": "-", "…": "~", "■": "#", "□": ".", "−": "-", "√": "sqrt ", "β": "beta",
    }
)  # fmt: skip


def text(scheme: Scheme) -> str:
    """A model."""
    return "\n".join(map(clean, _model(scheme))) + "\n"


def block_text(box: Box) -> str:
    """A block alone."""
    return "\n".join(map(clean, _framed(box))) + "\n"


def for_encoding(drawn: str, encoding: str | None) -> str:
    """A text in ASCII where an encoding lacks its letters."""
    try:
        drawn.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return drawn.translate(ASCII).encode("ascii", "replace").decode()
    return drawn


def _model(scheme: Scheme) -> Iterator[str]:
    yield scheme.title
    yield from _wrapped(figures.sizes(scheme), "")
    yield from _wrapped([f"{value} {of}" for value, of in figures.totals(scheme.totals)], "")
    yield ""
    above = [*reversed(scheme.mtp), scheme.head, scheme.norm]
    below = [*([scheme.position] if scheme.position else []), scheme.embedding, *scheme.inputs]
    yield from (f"  {box.name or box.kind}" for box in above)
    yield from (f"  {_run(run)}" for run in reversed(scheme.stack))
    yield from (f"  {box.name or box.kind}" for box in below)
    shown: dict[Any, str] = {}
    for panel in reversed(scheme.panels):
        yield ""
        yield from _panel(panel, shown)
    for box in scheme.beside:
        yield ""
        yield from _framed(box)


def _run(run: Run) -> str:
    names = " ".join(run.panels)
    return f"{f'({names})' if len(run.panels) > 1 else names} × {run.times}"


def _panel(panel: Panel, shown: dict[Any, str]) -> Iterator[str]:
    yield f"{panel.name}  {figures.layers(panel)} × {len(panel.layers)}"
    yield from _wrapped(figures.of_layer(panel), "   ")
    streams = "│" * max(1, min(panel.streams, 4))
    used = {slot for branch in panel.branches for slot in (branch.before, branch.after, branch.beyond)}
    rest = [child for child in panel.residual.children if child.slot not in used]
    label = BETWEEN.join([panel.residual.name, *panel.residual.lines, *(f"{c.slot} {c.name}" for c in rest)])
    yield f"{'▲' * len(streams)}  {label}"
    norms = {child.slot: child.name for child in panel.residual.children}
    for branch in reversed(panel.branches):
        yield from _branch(panel, branch, norms, streams, shown)


def _branch(panel: Panel, branch: Branch, norms: dict[str, str], streams: str, shown: dict[Any, str]) -> Iterator[str]:
    mixers = [box for box in (getattr(panel, name) for name in branch.mixers) if not box.empty]
    if not mixers:
        return
    if branch.beyond:
        yield f"{streams}  {norms[branch.beyond]}"
    yield f"{streams[:-1]}⊕──┐"
    if branch.after:
        yield f"{streams}  {norms[branch.after]}"
    for box in reversed(mixers):
        first = shown.setdefault(looks(box), panel.name)
        drawn = box if first == panel.name else replace(box, lines=(f"as in {first}",), children=(), cached=())
        yield from (f"{streams}  {line}" for line in _framed(drawn, WIDTH - 3 - len(streams)))
    if branch.before:
        yield f"{streams}  {norms[branch.before]}"
    yield f"{streams}──┘"


def _framed(box: Box, width: int = WIDTH) -> Iterator[str]:
    """A box with its children and caches as lines in it."""
    count = figures.parameters(box.parameters) if box.parameters else ""
    head = f"─ {box.name} "
    tail = f" {count} ─" if count else ""
    yield f"┌{head}{'─' * max(1, width - 2 - len(head) - len(tail))}{tail}┐"
    for line in _inside(box, width - 4):
        yield f"│ {line.ljust(width - 4)} │"
    yield f"└{'─' * (width - 2)}┘"


def _inside(box: Box, width: int, indent: str = "") -> Iterator[str]:
    yield from _wrapped(box.lines, indent, width)
    for child in reversed(box.children):
        chosen = [f"{child.chosen[0]:,} of {child.chosen[1]:,}"] if child.chosen else []
        label = BETWEEN.join([*chosen, *child.lines])
        where = child.acts or child.slot.partition(".")[0]
        yield from _wrapped([f"{where}: {child.name}{label and f' ({label})'}"], indent, width)
        yield from _inside(Box("", "", "", cached=child.cached, children=child.children), width, f"{indent}  ")
    for held in box.cached:
        yield from _wrapped([f"▒ {BETWEEN.join(figures.cached(held))}"], indent, width)


def _wrapped(items: Sequence[str], indent: str, width: int = WIDTH) -> Iterator[str]:
    """Items joined into lines of a width; one that is longer is cut into pieces."""
    line = ""
    for item in items:
        joined = f"{line}{BETWEEN}{item}" if line else item
        if len(indent) + len(joined) <= width:
            line = joined
            continue
        if line:
            yield indent + line
        room = width - len(indent)
        *pieces, line = [item[i : i + room] for i in range(0, len(item), room)]
        yield from (indent + piece for piece in pieces)
    if line:
        yield indent + line
