"""A difference as rows of texts: a sign, what it is of, A, B, and the change. ≠ stands before what differs, = before a
block that is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from blockwright.lab.card import BEYOND, flat, scaled
from blockwright.lab.difference.difference import Difference, Pair, Runs, minus, spelt
from blockwright.lab.difference.settings import ABSENT, Entry, Name
from blockwright.lab.drawing.sheet import clean
from blockwright.lab.report.words import HUGE, MINUS, plain, signed
from blockwright.registry import printing

DIFFERS, SAME = "≠", "="
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
            sign = DIFFERS if ours != theirs else SAME
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
    return SAME if entry.same else DIFFERS, label, a, b, "" if difference is None else signed(difference, 4)


def _shown(entries: Iterable[Entry]) -> list[Row]:
    return [_row(entry) for entry in entries if not entry.same or isinstance(entry.a, Name)]


def _changed(entries: Iterable[Entry]) -> list[Row]:
    return [_row(entry) for entry in entries if not entry.same]


def _row(entry: Entry) -> Row:
    return SAME if entry.same else DIFFERS, clean(entry.path), _text(entry.a), _text(entry.b), ""


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


STYLES = {DIFFERS: "bold yellow", SAME: "dim", "": "bold"}
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
