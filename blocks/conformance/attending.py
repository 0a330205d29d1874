"""What the ``mix`` of an attention by scores gives to ``attend``, each mistake by its name: a pass leaves shapes to
torch, whose messages know no block."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.remembered import Held, Layout, layout, parts
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.base import Block
from blockwright.blocks.conformance.setting import PromiseError, must
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.choice import Kernels

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
