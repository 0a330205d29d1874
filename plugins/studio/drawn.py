"""The picture of a composition, its costs, and where in the composition each box is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from blockwright.blocks.sample import remembering
from blockwright.lab.drawing import figures
from blockwright.lab.drawing.parts import Box, Scheme, Totals
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme

# A path of an error message: what only ``overrides`` explains is ``model.ffn (layer 3)``.
WRITTEN = re.compile(r"model\.([\w.]+)( \(layer \d+\))?")
MOST = 2000  # costs of parts that are remembered
_costs: dict[Any, int] = {}  # of this process, which draws models that differ in one part
FIGURES = ("parameters", "active", "forward_flops", "cache_bytes")  # those of the picture, in its order
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
    return {"picture": picture(found), "boxes": places(found), "totals": _totals(found.totals)}


def _totals(found: Totals) -> dict[str, dict[str, Any]]:
    """Name → value of each figure, as the picture writes it, and what it is a figure of."""
    written = zip(FIGURES, figures.totals(found), strict=True)
    return {name: {"value": getattr(found, name), "text": text, "of": of} for name, (text, of) in written}


def places(of: Scheme) -> dict[str, str]:
    """Path of each box → path in the composition. A child that is the model's own is written there."""
    return {box.path: place for box in of.boxes() if (place := _place(box))}


def _place(box: Box) -> str:
    written = WRITTEN.fullmatch(box.written)
    if written is None:
        return OF_NO_BLOCK.get(box.kind, "")
    return "overrides" if written[2] else written[1]
