"""A page for every preset: totals, the blocks in it, and its source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from blockwright.lab.card import in_bytes, scaled
from blockwright.lab.catalogue import BYTES, table
from blockwright.lab.drawing.parts import Scheme
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.registry import presets
from docs.site.markdown import Pages, fence, link, prose
from docs.site.sources import block_place


def _count(value: Any) -> str:
    return f"{value:,.0f}"


Row = tuple[str, str, Callable[[Any], str]]  # label, total of a scheme, format
ROWS: tuple[Row, ...] = (
    ("parameters", "parameters", _count),
    ("active parameters, a token", "active", _count),
    ("tokens of the sequence, for FLOPs and cache", "context", _count),
    ("FLOPs a token, forward", "forward_flops", scaled),
    ("FLOPs a token, training", "training_flops", scaled),
    ("cache, numbers a token", "cache_numbers", _count),
    ("cache, numbers a token beyond windows", "cache_beyond", _count),
    ("cache, constant numbers", "cache_constant", _count),
    ("cache, bytes a token in bf16", "cache_bytes", _count),
    ("cache of the sequence in bf16", "cache_at_context", in_bytes),
)


def drawn(names: Iterable[str]) -> dict[str, Scheme]:
    """Name of a preset → its scheme."""
    return {name: scheme({"vocab_size": BYTES, **presets.read(name)}, name) for name in names}


def users(models: Mapping[str, Scheme]) -> dict[tuple[str, str], list[str]]:
    """Kind and name of a block → the presets that have it."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, model in models.items():
        for block in blocks_of(model):
            found.setdefault(block, []).append(name)
    return found


def blocks_of(model: Scheme) -> list[tuple[str, str]]:
    """Kind and name of every registered block in a model, in alphabetical order."""
    return sorted({(box.kind, box.name) for box in model.boxes() if box.name})


def place(name: str) -> str:
    """The page of a preset."""
    return f"reference/presets/{name}.md"


def add(pages: Pages, models: Mapping[str, Scheme]) -> None:
    """Add the pages of all presets, and their list."""
    heirs = _heirs(models)
    rows = []
    for name, model in models.items():
        pages.files[_drawing(name)] = picture(model)
        pages.add(place(name), _page(name, model, heirs.get(name, [])))
        totals = [model.totals.parameters, model.totals.active, model.totals.cache_bytes]
        rows.append([link(f"`{name}`", place(name)), prose(presets.find(name).summary), *map(_count, totals)])
    head = ["`model=`", "what it is", "parameters", "active", "cache bytes a token, bf16"]
    about = (
        "A preset is a whole model in one YAML file. `model=NAME` chooses it on any command line,"
        f" and {link('write a preset', 'how-to/presets.md')} adds yours."
    )
    pages.add("reference/presets/index.md", "\n\n".join(["# Presets", about, "\n".join(table(head, rows))]))


def _drawing(name: str) -> str:
    return place(name).removesuffix(".md") + ".svg"


def _heirs(names: Iterable[str]) -> dict[str, list[str]]:
    """Preset → those that inherit it directly."""
    found: dict[str, list[str]] = {}
    for name in names:
        if parent := _parent(name):
            found.setdefault(parent, []).append(name)
    return found


def _parent(name: str) -> str | None:
    lines = presets.find(name).file.read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("inherits:")), None)


def _page(name: str, model: Scheme, heirs: Sequence[str]) -> str:
    preset, parent = presets.find(name), _parent(name)
    relations = [f"It inherits {link(f'`{parent}`', place(parent))}."] if parent else []
    if heirs:
        relations.append(f"Inherited by {', '.join(link(f'`{heir}`', place(heir)) for heir in heirs)}.")
    # What the picture of a model shows, for those who do not see it
    layers = [f"{len(panel.layers)} × {panel.attention.name} and {panel.ffn.name}" for panel in model.panels]
    alternative = f"{model.title}: {'; '.join(layers)}; {model.totals.parameters:,} parameters"
    values = asdict(model.totals)
    figures = [[label, written(values[key])] for label, key, written in ROWS if values[key]]
    return "\n\n".join(
        [
            f"# {name}",
            prose(preset.summary),
            fence(f"blockwright describe model={name}", "bash"),
            f"![{alternative}](/{_drawing(name)})",
            "## Totals",
            "\n".join(table(["figure", "value"], figures)),
            "## Blocks",
            "\n".join(table(["kind", "blocks"], _kinds(model))),
            "## Source",
            *([" ".join(relations)] if relations else []),
            fence(preset.file.read_text(), "yaml"),
        ]
    )


def _kinds(model: Scheme) -> list[list[str]]:
    names: dict[str, list[str]] = {}
    for kind, name in blocks_of(model):
        names.setdefault(kind, []).append(link(f"`{name}`", block_place(kind, name)))
    return [[link(kind, block_place(kind)), ", ".join(found)] for kind, found in names.items()]
