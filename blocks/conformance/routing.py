"""Checks of gates and balance losses."""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.balance import Balance
from blockwright.blocks.conformance.behaviour import BOUND
from blockwright.blocks.conformance.setting import ExemptError, Setting, filled, must, must_agree, tokens, watched
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.blocks.kernels.scoring import PADDING
from blockwright.blocks.selector.base import Selector


def routing_contract(setting: Setting) -> None:
    """A gate's Routing keeps its contract: experts [T,k] in range (E: no expert, with weight 0) without repetition,
    weights [T,k] and probs [T,E] finite and fp32 in any model, load [E] the count of the choices, without gradient,
    losses finite scalars; in training and in evaluation."""
    for dtype in (torch.float32, torch.bfloat16):
        decoder = setting.decoder(dtype=dtype)
        gates = [m for m in decoder.modules() if isinstance(m, Gating)]
        if not gates:
            raise ExemptError("it does not route tokens")
        for training in (True, False):
            with watched(gates) as seen:
                decoder.train(training).hidden(tokens(2, 7))
            for gate, _, routing in seen:
                _check_routing(gate, routing, 14)


def _check_routing(gate: Gating, routing: Routing, T: int) -> None:
    experts, weights, probs, losses, load, *_ = routing
    E = gate.n_experts
    shapes = {"experts": (experts, len(experts[0])), "weights": (weights, experts.shape[1]), "probs": (probs, E)}
    for name, (tensor, width) in shapes.items():
        must(tensor.shape == (T, width), f"{name} has shape {tuple(tensor.shape)} instead of ({T}, {width})")
    must(experts.dtype == torch.int64, f"experts are {experts.dtype}, not int64")
    for name, tensor in {"weights": weights, "probs": probs, "load": load}.items():
        must(tensor.dtype == torch.float32, f"{name} are {tensor.dtype}, not fp32")
        must(bool(torch.isfinite(tensor).all()), f"{name} are not all finite")
    must(bool(((experts >= 0) & (experts <= E)).all()), f"experts lie outside 0 … {E - 1}, and {E} for none")
    must(bool((weights[experts == E] == 0).all()), "an entry for no expert has a non-zero weight")
    counts = torch.bincount(experts.flatten(), minlength=E + 1)[:E]
    must(load.shape == (E,) and torch.equal(load, counts.float()), "load is not the count of the experts chosen")
    must(not load.requires_grad, "load carries a gradient")
    real = int(counts.sum())
    promised = experts.numel() if routing.pairs is None else routing.pairs
    must(real == promised, f"{real} entries of experts are below E, but pairs is {promised}")
    ordered = experts.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < E)
    must(not twice.any(), "a token goes to one expert twice")
    counted = routing.counted
    must(
        len(counted) == E and not counted.requires_grad,
        "what an update takes has no row for each expert, or a gradient",
    )
    for name, loss in losses.items():
        must(loss.ndim == 0 and bool(torch.isfinite(loss)), f"the loss {name} is not a finite scalar")


def balance_gradients(setting: Setting) -> None:
    """Balance losses differentiate only through the affinities (and their logits): with these detached nothing carries
    a gradient, with them the router gets a finite, non-zero one."""
    decoder = _balanced(setting).train()
    balances = [m for m in decoder.modules() if isinstance(m, Balance)]
    if not balances:
        raise ExemptError("it has no balance loss")
    with watched(balances) as seen:
        decoder.hidden(tokens(2, 12))
    for balance, given, losses in seen:
        for name, loss in balance(*(t.detach() for t in given)).items():
            must(not loss.requires_grad, f"{name} has a gradient that does not come from the affinities")
        inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in given]
        fresh = balance(*inputs)
        must(bool(fresh) and fresh.keys() == losses.keys(), "it returns other losses when called again")
        floats = [t for t in inputs if t.requires_grad]
        grads = torch.autograd.grad(torch.stack([*fresh.values()]).sum(), floats, allow_unused=True)
        reached = [g for g in grads if g is not None]
        must(bool(reached), "its losses do not depend on the affinities")
        must(all(bool(torch.isfinite(g).all()) for g in reached), "its gradient is not finite")
        must(any(bool(g.any()) for g in reached), "its gradient is zero everywhere")


def _balanced(setting: Setting) -> Decoder:
    """The block's decoder; a gate that takes a balance loss but has none by default gets one."""
    losses = [filled(registry.lookup("balance", name)) for name in registry.names("balance")[:1]]
    children = [p.name for p in setting.entry.schema.children.values() if p.child == "balance"]
    return setting.decoder({**dict(zip(children, losses, strict=False)), **setting.node()})


def padding(setting: Setting) -> None:
    """Padding (segments of −1), in columns and rows, changes no load, no balance loss and no loss of a selector, within
    1e-5; in evaluation and, where nothing is drawn, in training."""
    decoder = setting.decoder()
    learns = [m for m in decoder.modules() if isinstance(m, Selector) and m.learns]
    if not learns and not any(isinstance(m, Gating) for m in decoder.modules()):
        raise ExemptError("it neither routes tokens nor learns to select them")
    ids = tokens(2, 9)
    padded, segments = tokens(3, 12, seed=1), torch.full((3, 12), PADDING, dtype=torch.int64)
    padded[:2, :9], segments[:2, :9] = ids, 0
    for training in (False, True):
        decoder.train(training)
        for selector in learns:
            selector.train()
        alone, again, among = (_of_routing(decoder, *given) for given in ((ids, 0), (ids, 1), (padded, 0, segments)))
        if not training or all(map(torch.equal, alone.values(), again.values())):
            for name, value in alone.items():
                must_agree(among[name], value, BOUND, f"{name} with padding")


def _of_routing(decoder: Decoder, ids: Tensor, seed: int, segments: Tensor | None = None) -> dict[str, Tensor]:
    """What all layers count, and their losses, by name."""
    torch.manual_seed(seed)
    found: dict[str, Tensor] = {}
    for i, routing in enumerate(decoder.hidden(ids, segments=segments)[1]):
        if routing is not None:
            counted = routing.load if routing.seen is None else routing.seen.sum(1)  # rounding may choose another bin
            each = {"load": routing.load, "what an update takes": counted, **routing.losses}
            found |= {f"{name} of layer {i}": value.detach() for name, value in each.items()}
    return found
