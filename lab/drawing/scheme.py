"""A model as it is drawn, from its composition: each distinct layer once, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from blockwright.blocks.cost import (
    cache_bytes,
    count_families,
    flops_per_token,
    growth_beyond_windows,
    idle,
)
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.layer import LAYER_PARTS
from blockwright.blocks.memory import Memory
from blockwright.blocks.sample import Sample, sample
from blockwright.lab.drawing.boxes import Records, box, count, part
from blockwright.lab.drawing.parts import Box, Branch, Panel, Run, Scheme, Totals, branches, norms
from blockwright.registry.recording import recorded

USUAL = 4096  # tokens that FLOPs are counted for, as in ``blockwright describe``
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def scheme(model: Mapping[str, Any] | Decoder, title: str = "", context: int | None = None) -> Scheme:
    """The scheme of a model.

    Args:
        model: a composition, or a decoder, whose composition is drawn
        title: its name
        context: tokens of the sequence that FLOPs are counted for; None: 4096, or fewer if the model must

    Raises:
        ConfigError: the composition is refused
    """
    with recorded() as records:
        made = sample(model.config if isinstance(model, Decoder) else model)
    decoder = made.decoder
    config = decoder.config
    unused = [idle(layer, decoder) for layer in decoder.layers]
    panels, sequence = _panels(made, unused, records)
    position = records[id(decoder.position)]
    return Scheme(
        title=title,
        vocab_size=config["vocab_size"],
        d_model=config["d_model"],
        n_layers=config["n_layers"],
        max_positions=config["max_positions"],
        inputs=tuple(box(block, kind, kind, records) for kind, block in decoder.inputs.items()),
        embedding=part("embedding", "embedding", parameters=count(decoder.embedding)),
        position=None if position.entry.name == "none" else box(decoder.position, "position", "position", records),
        panels=panels,
        stack=runs(sequence),
        norm=box(decoder.norm, "norm", "norm", records),
        head=part("head", "head", *(["tied"] if decoder.head is None else []), parameters=count(decoder.head)),
        loop=None if decoder.loop is None else box(decoder.loop, "loop", "loop", records),
        mtp=tuple(part(f"mtp.{k}", "mtp", parameters=count(depth)) for k, depth in enumerate(decoder.mtp)),
        totals=_totals(made, unused, context or min(USUAL, config["max_positions"])),
    )


def _panels(made: Sample, unused: Sequence[int], records: Records) -> tuple[tuple[Panel, ...], list[str]]:
    """The distinct layers, and the panel of each layer."""
    looks = [tuple(map(_looks, _boxes(layer, "layer", records).values())) for layer in made.decoder.layers]
    drawn = {look: [i for i, other in enumerate(looks) if other == look] for look in looks}
    order = sorted(drawn.values(), key=lambda alike: min(made.layers[i][0] for i in alike))
    panels = [_panel(made, alike, unused, name, records) for name, alike in zip(_names(len(order)), order, strict=True)]
    names = {index: panel.name for panel in panels for index in panel.layers}
    return tuple(panels), [names[index] for index in sorted(names)]


def _looks(of: Box) -> str:
    """What is drawn of a box: not where it is written, nor parameters that only the first or last layer has."""
    return repr((of.kind, of.slot, of.name, of.lines, of.settings, of.cached, list(map(_looks, of.children))))


def _names(n: int) -> list[str]:
    return [LETTERS[i] if n <= len(LETTERS) else str(i + 1) for i in range(n)]


def _boxes(layer: Any, path: str, records: Records) -> dict[str, Box]:
    """Part of a layer → its box."""
    parts = {name: getattr(layer, name) for name in LAYER_PARTS}
    return {name: box(part, f"{path}.{name}", name, records) for name, part in parts.items() if part is not None}


def _panel(made: Sample, alike: Sequence[int], unused: Sequence[int], name: str, records: Records) -> Panel:
    """The panel of layers that look alike.

    Args:
        alike: places in the sample
        unused: for each place, parameters of a layer that a token does not use
    """
    first = min(alike, key=lambda i: made.layers[i][0])
    layer: Any = made.decoder.layers[first]
    path = f"layers.{made.layers[first][0]}"
    boxes = _boxes(layer, path, records)
    numbers, beyond, constant = _cache(Sample(made.decoder.with_layers([layer]), ((0,),)))
    return Panel(
        path=path,
        name=name,
        layers=tuple(sorted(index for i in alike for index in made.layers[i])),
        attention=boxes["attention"],
        ffn=boxes["ffn"],
        residual=_joined(boxes["residual"]),
        memory=boxes.get("memory"),
        branches=_with_memory(
            branches(layer.residual, norms(layer.residual, records), made.decoder.config["d_model"]), layer.memory
        ),
        streams=1 if layer.residual.streams is None else layer.residual.streams,
        parameters=count(layer),
        active=count(layer) - unused[first],
        cache_numbers=numbers,
        cache_beyond=beyond,
        cache_constant=constant,
    )


def _with_memory(found: tuple[Branch, ...], memory: Memory | None) -> tuple[Branch, ...]:
    """The branches of a layer, with that of its memory at its place."""
    if memory is None:
        return found
    own = (Branch(("memory",)),)
    return own + found if memory.place == "before" else found + own


def _joined(residual: Box) -> Box:
    """The box of a residual block with the children of one inside it."""
    children = [_joined(child) if child.kind == residual.kind else child for child in residual.children]
    inner = [child for child in children if child.kind == residual.kind]
    names = [f"around {each.name}" for each in inner]
    own = [child for child in children if child not in inner]
    held = (child for each in inner for child in each.children)
    return replace(residual, lines=(*names, *residual.lines), children=(*own, *held))


def _cache(decoder: Sample) -> tuple[int | None, float | None, int | None]:
    """Numbers that a token adds at first, those beyond windows, and those besides."""
    try:
        one, two = (cache_bytes(decoder, n, torch.float32) // 4 for n in (1, 2))
        return two - one, growth_beyond_windows(decoder), 2 * one - two
    except NotImplementedError:  # a plug-in's attention may have no cache
        return None, None, None


def _totals(made: Sample, unused: Sequence[int], context: int) -> Totals:
    families, numbers = count_families(made), _cache(made)
    total = sum(families.values())
    without = sum(len(layers) * each for layers, each in zip(made.layers, unused, strict=True))
    forward, training = flops_per_token(made, context)
    cached = numbers[0] is not None
    one, two, at_context = (cache_bytes(made, n, torch.bfloat16) if cached else 0 for n in (1, 2, context))
    return Totals(
        parameters=total,
        active=total - without - families["mtp"],
        context=context,
        forward_flops=forward,
        training_flops=training,
        cache_numbers=numbers[0],
        cache_beyond=numbers[1],
        cache_constant=numbers[2],
        cache_bytes=two - one if cached else None,
        cache_at_context=at_context if cached else None,
    )


def runs(sequence: Sequence[str]) -> tuple[Run, ...]:
    """A sequence as runs of a repeated part: A, (B B C) × 3, B."""
    found, start = list[Run](), 0
    while start < len(sequence):
        run = max(
            _repeats(sequence, start), key=lambda r: (len(r.panels) * r.times if r.times > 1 else 0, -len(r.panels))
        )
        found.append(run)
        start += len(run.panels) * run.times
    return tuple(found)


def _repeats(sequence: Sequence[str], start: int) -> list[Run]:
    """For each length of a part that begins at ``start``, how many times it follows itself."""
    found = []
    for length in range(1, (len(sequence) - start) // 2 + 2):
        of = tuple(sequence[start : start + length])
        times = 1
        while tuple(sequence[start + length * times : start + length * (times + 1)]) == of:
            times += 1
        found.append(Run(of, times))
    return found
