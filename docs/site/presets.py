"""A page for every preset: totals, the blocks in it, and its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.lab.card import flat, in_bytes, scaled
from blockwright.lab.card_request import Options
from blockwright.lab.catalogue import BYTES, table
from blockwright.lab.describe import figures
from blockwright.registry import presets
from docs.site.markdown import fence, link, prose
from docs.site.pages import Pages
from docs.site.sources import block_place


def _count(value: Any) -> str:
    return f"{value:,.0f}"


Row = tuple[str, str, Callable[[Any], str]]  # label, dotted key of a card's figures, format
ROWS: tuple[Row, ...] = (
    ("layers", "shape.n_layers", _count),
    ("width", "shape.d_model", _count),
    ("vocabulary", "shape.vocab_size", _count),
    ("parameters", "parameters.total", _count),
    ("active parameters, a token", "parameters.active", _count),
    ("active, without embedding", "parameters.active_without_embedding", _count),
    ("tokens of the sequence, for FLOPs and cache", "flops.context", _count),
    ("FLOPs a token, forward", "flops.forward_per_token", scaled),
    ("FLOPs a token, training", "flops.training_per_token", scaled),
    ("cache, numbers a token", "cache.elements_per_token", _count),
    ("cache, numbers a token beyond windows", "cache.elements_beyond_windows", _count),
    ("cache, constant numbers", "cache.elements_constant", _count),
    ("cache, bytes a token in bf16", "cache.bytes_per_token.bf16", _count),
    ("cache of the sequence in bf16", "cache.bytes_at_context.bf16", in_bytes),
    ("weights in bf16", "weights.bytes.bf16", in_bytes),
)


@dataclass(frozen=True)
class Model:
    """A preset, composed on the meta device.

    Args:
        name: of the preset
        decoder: its decoder
        blocks: kind and name of every registered block in it
    """

    name: str
    decoder: Decoder
    blocks: frozenset[tuple[str, str]]


def composed() -> list[Model]:
    """Every preset, with the blocks that it really has."""
    known = {
        registry.lookup(kind, name).cls: (kind, name) for kind in registry.kinds() for name in registry.names(kind)
    }
    models = []
    for name in presets.names():
        decoder = compose({"vocab_size": BYTES, **presets.read(name)}, device="meta")
        used = frozenset(known[type(module)] for module in decoder.modules() if type(module) in known)
        models.append(Model(name, decoder, used))
    return models


def users(models: list[Model]) -> dict[tuple[str, str], list[str]]:
    """Kind and name of a block → the presets that have it."""
    found: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for block in sorted(model.blocks):
            found.setdefault(block, []).append(model.name)
    return found


def place(name: str) -> str:
    """The page of a preset."""
    return f"reference/presets/{name}.md"


def add(pages: Pages, models: list[Model]) -> None:
    """Add the pages of all presets, and their list."""
    heirs = _heirs(models)
    rows = []
    for model in models:
        card = flat(figures(model.decoder, Options()))
        pages.add(place(model.name), _page(model, card, heirs.get(model.name, [])))
        totals = [_count(card[key]) for key in ("parameters.total", "parameters.active")]
        cache = f"{_count(card['cache.bytes_per_token.bf16'])} B"
        rows.append([link(f"`{model.name}`", place(model.name)), prose(presets.find(model.name).summary), *totals, cache])
    head = ["`model=`", "what it is", "parameters", "active", "cache a token, bf16"]
    about = (
        "A preset is a whole model in one YAML file. `model=NAME` chooses it on any command line,"
        f" and {link('write a preset', 'how-to/presets.md')} adds yours."
    )
    pages.add("reference/presets/index.md", "\n\n".join(["# Presets", about, "\n".join(table(head, rows))]))


def _heirs(models: list[Model]) -> dict[str, list[str]]:
    """Preset → those that inherit it directly."""
    found: dict[str, list[str]] = {}
    for model in models:
        if parent := _parent(model.name):
            found.setdefault(parent, []).append(model.name)
    return found


def _parent(name: str) -> str | None:
    lines = presets.find(name).file.read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("inherits:")), None)


def _page(model: Model, card: Mapping[str, Any], heirs: list[str]) -> str:
    preset = presets.find(model.name)
    parent = _parent(model.name)
    relations = [f"It inherits {link(f'`{parent}`', place(parent))}."] if parent else []
    if heirs:
        relations.append(f"Inherited by {', '.join(link(f'`{heir}`', place(heir)) for heir in heirs)}.")
    return "\n\n".join(
        [
            f"# {model.name}",
            prose(preset.summary),
            fence(f"blockwright describe model={model.name}\nblockwright train model={model.name}", "bash"),
            "## Totals",
            "\n".join(table(["figure", "value"], _figures(card))),
            "## Blocks",
            "\n".join(table(["kind", "blocks"], _kinds(model))),
            "## Source",
            *([" ".join(relations)] if relations else []),
            fence(preset.file.read_text(), "yaml"),
        ]
    )


def _figures(card: Mapping[str, Any]) -> list[list[str]]:
    families = [
        (f"parameters, {key.rpartition('.')[2].replace('_', ' ')}", key, _count)
        for key in card
        if key.startswith("parameters.families.")
    ]
    rows = (*ROWS[:6], *families, *ROWS[6:])
    return [[label, written(card[key])] for label, key, written in rows if card.get(key)]


def _kinds(model: Model) -> list[list[str]]:
    names: dict[str, list[str]] = {}
    for kind, name in sorted(model.blocks):
        names.setdefault(kind, []).append(link(f"`{name}`", block_place(kind, name)))
    return [[link(kind, block_place(kind)), ", ".join(found)] for kind, found in names.items()]
