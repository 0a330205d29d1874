"""What blocks of one kind must do besides: attentions by scores, gates and balance losses.

Each mistake in what the ``mix`` of an attention gives to ``attend`` has a message of its own: a pass leaves shapes to
torch, whose messages know no block.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.attention.remembered import Held, Layout, layout, parts
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.balance import Balance
from blockwright.blocks.base import Block
from blockwright.blocks.conformance.setting import (
    BOUND,
    ExemptError,
    PromiseError,
    Setting,
    filled,
    must,
    must_agree,
    tokens,
    watched,
)
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.scoring import PADDING
from blockwright.blocks.selector.base import Selector

NEEDED = {"position": "the child that biases scores", "scale": "which multiplies q·k"}
ROWS, TOKENS = 2, 7


def remembered_by_mix(block: Scored) -> Layout:
    """What ``mix`` gives to ``attend`` to be remembered of a token, by a pass on the meta device.

    Raises:
        PromiseError: ``mix`` does not attend once, fails without values, or gives or returns other shapes than it must
    """
    name, twin, found = type(block).__name__, _without_values(block), list[Layout]()

    def noted(x: Tensor, given: Pass, q: Tensor, held: Held, latent: Tensor | None = None) -> Tensor:
        _check_given(twin, name, x, q, held)
        found.append(layout(held))
        values = _expanded(twin, name, parts(held), q)
        return twin.read_out(q.new_empty(*q.shape[:3], values.shape[-1]), x, held)

    twin.attend = noted
    x = torch.empty(ROWS, TOKENS, block.d_model, dtype=next(block.parameters()).dtype, device="meta")
    given = Pass(torch.zeros(1, TOKENS, dtype=torch.int64, device="meta"), carry={})
    with torch.no_grad(), torch.device("meta"):
        try:
            y = twin.mix(x, given)
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, NotImplementedError) and "meta" not in str(error):
                raise  # it would fail on any token
            rule = f"{name}.mix fails on tokens without values, of which costs are measured"
            raise PromiseError(f"{rule} ({error})") from None
    must(len(found) == 1, f"{name}.mix calls attend {len(found)} times; it must once")
    must(
        y.shape == x.shape,
        f"{name}.mix gives {_shape(y)} of x of shape {_shape(x)}: it returns [B,T,D]. attend gives [B,T,N,V], "
        "for W_o(y.flatten(-2))",
    )
    return found[0]


def _without_values(block: nn.Module) -> Any:
    """A copy on the meta device, whole where parameters are distributed."""
    memo: dict[int, Any] = {}
    for p in chain(block.parameters(), block.buffers()):
        empty = torch.empty(p.shape, dtype=p.dtype, device="meta")
        memo[id(p)] = nn.Parameter(empty, p.requires_grad) if isinstance(p, nn.Parameter) else empty
    twin = copy.deepcopy(block, memo)
    for module in twin.modules():
        if isinstance(module, Block):
            module.kernels = Kernels()  # those of another device may not know this one
    return twin


def _check_given(block: Any, name: str, x: Tensor, q: Tensor, held: Any) -> None:
    """Queries [B,T,N,H], and a dict of what is remembered, [B,T,…]."""
    for attribute, what in NEEDED.items():
        must(hasattr(block, attribute), f"{name} sets no self.{attribute}, {what}: set it in __init__")
    must(
        q.ndim == 4 and q.shape[:2] == x.shape[:2],
        f"{name}.mix gives attend queries of shape {_shape(q)} for tokens of shape {_shape(x)}: they are [B,T,N,H], "
        "W(x).unflatten(-1, (-1, H)) before they are rotated",
    )
    must(
        isinstance(held, Mapping) and bool(held),
        f"{name}.mix gives attend a {type(held).__name__} of what is remembered: it is a dict, name → tensor "
        '[B,T,…], as {"k": k, "v": v}',
    )
    for part in parts(held):
        shape = _shape(part) if isinstance(part, Tensor) else type(part).__name__
        must(
            isinstance(part, Tensor) and part.shape[:2] == x.shape[:2],
            f"{name}.mix gives attend {shape} to be remembered of tokens of shape {_shape(x)}: everything in the dict "
            "is [B,T,…], one entry for each token of x",
        )


def _expanded(block: Any, name: str, held: Sequence[Tensor], q: Tensor) -> Tensor:
    """The values of ``Scored.expand``: keys [B,S,K,H] and values [B,S,K,V], of which K divides N."""
    found = block.expand(held)
    got = f"{len(found)} tensors" if isinstance(found, tuple) else type(found).__name__
    must(
        isinstance(found, tuple) and len(found) == 2,
        f"{name}.expand gives {got}: it returns keys and values, two tensors [B,S,K,·]",
    )
    k, v = found
    must(
        k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3],
        f"{name}.expand gives keys of shape {_shape(k)} and values of shape {_shape(v)}: they are [B,S,K,H] and "
        "[B,S,K,V], with as many heads of both",
    )
    must(
        k.shape[3] == q.shape[3],
        f"{name} has queries of width {q.shape[3]} and keys of width {k.shape[3]}: both are [.,.,.,H] with one H",
    )
    must(
        q.shape[2] % k.shape[2] == 0,
        f"{name} has {q.shape[2]} heads of queries and {k.shape[2]} of keys: the second divides the first, or repeat "
        "keys in expand",
    )
    return v


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


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
