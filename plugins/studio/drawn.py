"""The picture of a composition, its costs, and where in the composition each box is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from blockwright.blocks.cost import remembering
from blockwright.lab.drawing.parts import Box, Scheme
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme

# A path of an error message: what only ``overrides`` explains is ``model.ffn (layer 3)``.
WRITTEN = re.compile(r"model\.([\w.]+)( \(layer \d+\))?")
MOST = 2000  # costs of parts that are remembered
_costs: dict[Any, int] = {}  # of this process, which draws models that differ in one part
OF_NO_BLOCK = {"embedding": "d_model", "head": "vocab_size"}  # kind of a box → the setting by which it is exchanged


def draw(model: Mapping[str, Any], title: str) -> dict[str, Any]:
    """A model as the page shows it.

    Args:
        model: a composition
        title: its name

    Returns:
        ``picture``, an SVG; ``boxes``: path of a box → path in the composition; ``totals``: figures of the whole

    Raises:
        ConfigError: the composition is refused
    """
    if len(_costs) > MOST:
        _costs.clear()
    with remembering(_costs):
        found = scheme(model, title)
    totals = found.totals
    costs = {
        "parameters": totals.parameters,
        "active": totals.active,
        "forward_flops": totals.forward_flops,
        "cache_bytes": totals.cache_bytes,
    }
    return {"picture": picture(found), "boxes": places(found), "totals": costs}


def places(of: Scheme) -> dict[str, str]:
    """Path of each box → path in the composition. A child that is the model's own is written there."""
    blocks = [block for panel in of.panels for block in (panel.attention, panel.ffn, panel.residual)]
    tops = [*of.inputs, of.embedding, *([of.position] if of.position else []), of.norm, of.head, *of.mtp, *blocks]
    return {box.path: place for top in tops for box in _all(top) if (place := _place(box))}


def _all(box: Box) -> Iterator[Box]:
    yield box
    for child in box.children:
        yield from _all(child)


def _place(box: Box) -> str:
    written = WRITTEN.fullmatch(box.written)
    if written is None:
        return OF_NO_BLOCK.get(box.kind, "")
    return "overrides" if written[2] else written[1]
