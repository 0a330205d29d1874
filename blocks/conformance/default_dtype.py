"""The check that no number of a block depends on the default dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.base import Keys, Queries
from blockwright.blocks.conformance.setting import MODEL, Setting, must, shown, tokens
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating, updating
from blockwright.blocks.kernels.scoring import dense
from blockwright.blocks.memory import numbers
from blockwright.blocks.position.base import Position
from blockwright.blocks.precision import default_dtype

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
