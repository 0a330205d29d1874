"""The check that a block can be made wider under rules of width, by the coordinate check (blocks/coordinates.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from blockwright import registry
from blockwright.blocks.compose import check, compose
from blockwright.blocks.conformance.setting import MODEL, ExemptError, Setting, must
from blockwright.blocks.coordinates import Size, kind_of, measure, slopes, text
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.memory import Table
from blockwright.blocks.widths import multiplied, scales
from blockwright.registry import ConfigError

GROWTH = (1, 2, 4)  # times the widths of the usual setting
SIZES = ("d_ff", "n_heads", "n_kv_heads")  # that grow with d_model; others, such as latents, stay
RATE, STEPS = 0.01, 3
# A missing factor 1/width gives slopes of +1/2 to +1. With a side that stays, updates line up less as widths grow: with
# a rank of 12, or experts of width 12, down to -2.3.
LOWEST, HIGHEST = -2.5, 0.4


def width_rules(setting: Setting) -> None:
    """Under rules of width, which follow from the shapes of its weights, training changes what the block returns by as
    much in a decoder of twice and of four times the width: the slope of log change against log width is about 0."""
    base = compose(_wider(setting, 1), device="meta")
    names = set(setting.instances(base))
    if not any(p.ndim > 1 for block in setting.instances(base).values() for p in block.parameters()):
        raise ExemptError("it has no matrices")
    if setting.of_input:
        raise ExemptError("it works on content beside text, not on tokens")
    try:
        decoders = {growth: _scaled(base, _wider(setting, growth)) for growth in GROWTH}
    except (ConfigError, ValueError) as error:
        raise ExemptError(f"its sizes do not grow alike: {' '.join(str(error).split())}") from None
    tokens = text(2, 16, MODEL["vocab_size"], seed=0)
    measured: list[Mapping[str, Size]] = [measure(*decoders[growth], tokens, STEPS) for growth in GROWTH]
    design = multiplied(base, decoders[GROWTH[-1]][0])
    found = slopes([MODEL["d_model"] * growth for growth in GROWTH], measured)
    kinds = {kind_of(name) for name in names - design} & found.keys()
    if not kinds:
        raise ExemptError("it returns no activations")
    for kind in kinds:
        slope = found[kind].change
        must(LOWEST <= slope <= HIGHEST, f"what it returns changes by width^{slope:+.2f}: a sum lacks its factor")


def _wider(setting: Setting, growth: int) -> dict[str, Any]:
    model = check(setting.model())
    grown = {key: _grown(key, value, growth) for key, value in model.items()}
    return {**grown, "d_model": model["d_model"] * growth}


def _grown(key: str, value: Any, growth: int) -> Any:
    """A node with its sizes, written or by default, times the growth."""
    if not isinstance(value, Mapping):
        return value * growth if key in SIZES and type(value) is int else value
    node = dict(value)
    if key in registry.kinds() and node.get("name") in registry.names(key):
        defaults = registry.lookup(key, node["name"]).schema.parameters
        node = {**{name: defaults[name].default for name in SIZES if name in defaults}, **node}
    return {name: _grown(name, inner, growth) for name, inner in node.items()}


def _scaled(base: Decoder, model: Mapping[str, Any]) -> tuple[Decoder, torch.optim.Optimizer]:
    """A decoder under the rules, and Adam for it."""
    factors = scales(base, compose(model, device="meta"))
    decoder = compose(model, scales=factors)
    for table in (m for m in decoder.modules() if isinstance(m, Table)):
        table.sparse = False  # torch's Adam takes no sparse gradients
    groups = [{"params": [p], "lr": RATE * factors[n].rate} for n, p in decoder.named_parameters() if n in factors]
    return decoder, torch.optim.Adam(groups)
