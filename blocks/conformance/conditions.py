"""Each block under other conditions: another default dtype, and made wider under rules of width.

The second is the coordinate check (blocks/widths.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.base import Keys, Queries
from blockwright.blocks.compose import check, compose
from blockwright.blocks.conformance.setting import MODEL, ExemptError, Setting, must, shown, tokens
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating, updating
from blockwright.blocks.kernels.scoring import dense
from blockwright.blocks.memory import Table, numbers
from blockwright.blocks.position.base import Position
from blockwright.blocks.precision import default_dtype
from blockwright.blocks.widths import Size, kind_of, measure, multiplied, scales, slopes, text
from blockwright.registry import ConfigError

Found = dict[str, Tensor]


def independent_of_default_dtype(setting: Setting) -> None:
    """Under a bf16 default dtype, which a trainer may set inside a step, fp32 weights give bit-identical states, losses
    and gradients, and gates the same update. Of a position its angles and, without weights, its biases, of a gate
    or a balance loss the routing and the losses are bit-identical inside autocast too."""
    decoder = setting.decoder().train()
    step, exact = _step(decoder), _exact(decoder, setting.kind)
    with default_dtype(torch.bfloat16):
        _same(step, _step(decoder), "under a bf16 default dtype")
        _same(exact, _exact(decoder, setting.kind), "under a bf16 default dtype")
    if exact:
        with torch.autocast("cpu", torch.bfloat16):
            _same(exact, _exact(decoder, setting.kind), "inside autocast")


def _same(plain: Found, low: Found, where: str) -> None:
    must(plain.keys() == low.keys(), f"other losses or gradients {where}")
    for name, value in plain.items():
        must(value.dtype == low[name].dtype, f"{name} is {low[name].dtype} {where}, {value.dtype} without")
        must(torch.equal(value, low[name]), f"{name} has other bits {where}")


def _step(decoder: Decoder) -> Found:
    """A forward and a backward pass, and an update of copies of the gates."""
    torch.manual_seed(0)
    decoder.zero_grad()
    seen, media = shown(decoder, tokens(2, 9))
    with updating(copied := copy.deepcopy(decoder)), torch.no_grad():
        copied.hidden(seen, media=media)
    torch.manual_seed(0)
    hidden, routings = decoder.hidden(seen, media=media)
    losses = {
        f"{name} of layer {i}": loss
        for i, routing in enumerate(routings)
        if routing is not None
        for name, loss in routing.losses.items()
    }
    torch.stack([hidden.square().mean(), *losses.values()]).sum().backward()
    gradients = {f"the gradient of {n}": numbers(p.grad) for n, p in decoder.named_parameters() if p.grad is not None}
    return {"the hidden states": hidden.detach(), **losses, **gradients, **_gates(copied)}


def _gates(decoder: Decoder) -> Found:
    gates = {where: module for where, module in decoder.named_modules() if isinstance(module, Gating)}
    return {f"{name} of {where}": buffer for where, gate in gates.items() for name, buffer in gate.named_buffers()}


@torch.no_grad()
def _exact(decoder: Decoder, kind: str) -> Found:
    """What a block of this kind computes in fp32, whatever surrounds it."""
    found: Found = {}
    for where, module in decoder.named_modules():
        if kind == "position" and isinstance(module, Position):
            found |= {f"{name} of {where}": value for name, value in _encoded(module).items()}
        if kind in ("gating", "balance") and isinstance(module, Gating):
            found |= {f"{name} of {where}": value for name, value in _routed(module).items()}
    return found


def _encoded(position: Position) -> Found:
    generator, places = torch.Generator().manual_seed(0), torch.arange(190, 202)[None]
    wide = getattr(position, "rotary_dim", MODEL["d_model"])
    x, q = (
        torch.randn(1, 12, *size, generator=generator, dtype=torch.float32) for size in ((MODEL["d_model"],), (4, wide))
    )
    turned = position.rotate_in(q, q[:, :, :2], places, 12)
    bias = dense(position.bias(Queries(x, q, places), Keys(places, places[0], position.remember(x, places, 12))))
    found = {"the queries": turned[0], "the keys": turned[1]}
    found |= {"the embeddings": position.embed(x, places)} if position.place == "embedding" else {}
    weights = any(True for _ in position.parameters())  # which autocast may round, as those of any projection
    return found if bias is None or weights else {**found, "the bias": bias}


def _routed(gate: Gating) -> Found:
    x = torch.randn(2, 12, MODEL["d_model"], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    torch.manual_seed(0)  # of a gate that draws
    routing: Any = gate(x, tokens(2, 12))
    return {**{n: getattr(routing, n) for n in ("experts", "weights", "probs", "load")}, **routing.losses}


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
