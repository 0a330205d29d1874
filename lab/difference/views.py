"""A difference to look at: as rows of text, and as one picture.

A row is a sign, what it is of, A, B, and the change. ≠ stands before what differs, = before a block that is the same.
The picture has both models next to each other, and below them what they cost and the settings that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal
from xml.etree import ElementTree as ET

from rich import box
from rich.table import Table
from rich.text import Text

from blockwright.lab.card import BEYOND, flat, scaled
from blockwright.lab.difference.difference import Difference, Pair, Runs, Side, minus, spelt
from blockwright.lab.difference.settings import ABSENT, Entry, Name
from blockwright.lab.drawing.parts import Panel, Scheme
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.drawing.sheet import add, clean, cut
from blockwright.lab.report.words import HUGE, MINUS, plain, signed
from blockwright.registry import printing

DIFFERS, EQUALS = "≠", "="
LONGEST = 60  # characters of a value; the JSON has all
DIGEST = 12  # of a digest's 64
Row = tuple[str, str, str, str, str]


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # label, key of ``describe --json``, format
    ("parameters", "parameters.total", _whole),
    ("  active for a token", "parameters.active", _whole),
    ("tokens of the sequence", "flops.context", _whole),
    ("  FLOPs a token, forward", "flops.forward_per_token", scaled),
    ("  FLOPs a token, training", "flops.training_per_token", scaled),
    ("cache bytes a token, bf16", "cache.bytes_per_token.bf16", _whole),
    ("  numbers beyond the windows", BEYOND, _whole),
    ("  numbers besides, constant", "cache.elements_constant", _whole),
)


def costs(found: Difference) -> list[Row]:
    """What both models cost, as ``blockwright describe`` counts it."""
    a, b = (flat(model) for model in found.card["models"])
    rows = list[Row]()
    for label, key, written in COSTS:
        ours, theirs = a.get(key), b.get(key)
        if key == BEYOND and all(model[key] == model["cache.elements_per_token"] for model in (a, b)):
            continue
        if ours or theirs:
            one, two = ("none" if value is None else written(value) for value in (ours, theirs))
            sign = DIFFERS if ours != theirs else EQUALS
            rows.append((sign, label, one, two, percent(found.changes.get(key))))
    return rows


def percent(change: float | None) -> str:
    """A relative difference; empty if it is none, or not known."""
    return "" if not change else f"{100 * change:+,.1f} %".replace("-", MINUS)


def composition(found: Difference) -> list[Row]:
    """The settings of the models that differ, and all their blocks."""
    layers = [(_head(pair, found), *_shown(pair.entries)) for pair in found.layers]
    return [*_shown(found.model), *(row for rows in layers for row in rows)]


def differing(found: Difference) -> list[Row]:
    """The settings of the models that differ."""
    layers = [(_head(pair, found), *_changed(pair.entries)) for pair in found.layers if not pair.same]
    return [*_changed(found.model), *(row for rows in layers for row in rows)]


def _head(pair: Pair, found: Difference) -> Row:
    """The layers that a pair of groups fills."""
    sides = ((pair.a, found.a), (pair.b, found.b))
    a, b = (spelt(group, side.model.decoder.config["n_layers"]) for group, side in sides)
    return "", f"layers: {pair.part}", a, b, ""


def settings(runs: Runs) -> list[Row]:
    """The settings of two runs that differ, but those of their models."""
    return _changed(runs.settings)


def data(runs: Runs) -> list[Row]:
    """What both were trained on, and by which software."""
    parts = (("data", runs.data), ("software", runs.software))
    return [_row(Entry(f"{name}: {entry.path}", entry.a, entry.b)) for name, part in parts for entry in part]


def figures(runs: Runs) -> list[Row]:
    """How both ended, and their figures."""
    ends = [Entry(name, *(getattr(r, name, None) for r in (runs.a, runs.b))) for name in ("status", "steps")]
    return [*map(_row, ends), *(_figure(entry, runs.unit(entry.path)) for entry in runs.figures)]


def _figure(entry: Entry, unit: str) -> Row:
    a, b = (plain(value) if isinstance(value, int | float) else _text(value) for value in (entry.a, entry.b))
    difference = minus(entry)
    label = clean(f"{entry.path}, {unit}" if unit else entry.path)
    return EQUALS if entry.same else DIFFERS, label, a, b, "" if difference is None else signed(difference, 4)


def _shown(entries: Iterable[Entry]) -> list[Row]:
    return [_row(entry) for entry in entries if not entry.same or isinstance(entry.a, Name)]


def _changed(entries: Iterable[Entry]) -> list[Row]:
    return [_row(entry) for entry in entries if not entry.same]


def _row(entry: Entry) -> Row:
    return EQUALS if entry.same else DIFFERS, clean(entry.path), _text(entry.a), _text(entry.b), ""


def _text(value: Any) -> str:
    """A value as YAML would have it, shortened."""
    if value is ABSENT:
        return "–"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"{value:,.0f}" if value == value // 1 and abs(value) < HUGE else f"{value:g}"
    text = clean(str(value)[: LONGEST + 1])
    if len(text) == LONGEST + 1:
        return f"{text[: DIGEST if _is_digest(value) else LONGEST]}…"
    return text


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and set(value) <= set("0123456789abcdef")


# --- a difference in a terminal, or as plain lines --------------------------------------------------------------------


STYLES = {DIFFERS: "bold yellow", EQUALS: "dim", "": "bold"}
WIDEST = 20  # characters of a name over a column
ONE_SEED = (
    "No verdict: one seed cannot say whether B differs from A, and each is one run. "
    "`blockwright ablate` compares over several seeds."
)


def show(found: Difference) -> None:
    """Print what the models cost and are made of; of two runs, then what they have recorded."""
    out, heads = printing.console(), headers(found.a.name, found.b.name)
    for letter, name, head in zip("AB", (found.a.name, found.b.name), heads, strict=True):
        if head != name:
            out.print(Text(f"{letter}: {name}"))
    _print(heads, "change", [costs(found), composition(found)], same(found.entries))
    if (runs := found.runs) is not None:
        _print(heads, f"B {MINUS} A", [settings(runs), data(runs), figures(runs)], about(runs))


def headers(a: str, b: str) -> tuple[str, str]:
    """Names of the columns: the last part of a path; A and B where these are long, or the same."""
    one, two = (name if " " in name else PurePath(name).name for name in (a, b))  # with overrides, it is no path
    return (one, two) if one != two and max(len(one), len(two)) <= WIDEST else ("A", "B")


def same(entries: Sequence[Entry]) -> str:
    """How many settings are the same."""
    alike = sum(entry.same for entry in entries)
    return f"{alike} settings are the same, {len(entries) - alike} differ."


def about(runs: Runs) -> str:
    """What was compared of two runs, and that it decides nothing."""
    of = "" if runs.whole else " They are those that can change a weight or a figure: one side names a checkpoint."
    return f"{same(runs.settings)}{of}\n{ONE_SEED}"


def _print(heads: tuple[str, str], change: str, sections: Sequence[Sequence[Row]], caption: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, highlight=False, caption=caption, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for head in (*heads, change):
        table.add_column(Text(head), justify="right", overflow="fold")
    for section in sections:
        for row in section:
            table.add_row(*(Text(cell, style=STYLES[row[0]]) for cell in row))
        table.add_section()
    printing.show(table)


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
    shown = [*costs(found), *differing(found)]
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


def _table(root: ET.Element, found: Difference, shown: Sequence[Row], width: float, y: float) -> None:
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
