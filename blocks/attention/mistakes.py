"""Mistakes of a block of ``Scored``, told by its name: a kernel would tell of shapes that the block does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from blockwright.blocks.attention.remembered import Layout, parts

if TYPE_CHECKING:
    from blockwright.blocks.attention.scored import Scored

NEEDED = {"position": "the child that biases scores", "scale": "which multiplies q·k"}


def refuse_call(block: Scored, x: Tensor, q: Tensor, held: Any) -> None:
    """Refuse what is given to ``attend``: queries or what is remembered of other shapes than [B,T,…].

    Raises:
        TypeError
    """
    name, tokens = type(block).__name__, x.shape[:2]
    for attribute, what in NEEDED.items():
        if not hasattr(block, attribute):
            raise TypeError(f"{name} sets no self.{attribute}, {what}: set it in __init__")
    if q.ndim != 4 or q.shape[:2] != tokens:
        rule = f"{name}.mix gives attend queries of shape {_shape(q)} for tokens of shape {_shape(x)}"
        raise TypeError(f"{rule}: they are [B,T,N,H], W(x).unflatten(-1, (-1, H)) before they are rotated")
    if block.kv_source is not None and not block.kv_source.makes and not held:
        return
    if not isinstance(held, Mapping) or not held:
        rule = f"{name}.mix gives attend a {type(held).__name__} of what is remembered"
        raise TypeError(f'{rule}: it is a dict, name → tensor [B,T,…], as {{"k": k, "v": v}}')
    for part in parts(held):
        if not isinstance(part, Tensor) or part.shape[:2] != tokens:
            given = _shape(part) if isinstance(part, Tensor) else type(part).__name__
            rule = f"{name}.mix gives attend {given} to be remembered of tokens of shape {_shape(x)}"
            raise TypeError(f"{rule}: everything in the dict is [B,T,…], one entry for each token of x")


def expanded(block: Scored, held: Sequence[Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    """``Scored.expand``, for queries [B,T,N,H].

    Raises:
        TypeError: it does not give keys [B,S,K,H] and values [B,S,K,V], of which K divides N
    """
    found, name = block.expand(held), type(block).__name__
    if not isinstance(found, tuple) or len(found) != 2:
        got = f"{len(found)} tensors" if isinstance(found, tuple) else type(found).__name__
        raise TypeError(f"{name}.expand gives {got}: it returns keys and values, two tensors [B,S,K,·]")
    k, v = found
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        rule = f"{name}.expand gives keys of shape {_shape(k)} and values of shape {_shape(v)}"
        raise TypeError(f"{rule}: they are [B,S,K,H] and [B,S,K,V], with as many heads of both")
    if k.shape[3] != q.shape[3]:
        rule = f"{name} has queries of width {q.shape[3]} and keys of width {k.shape[3]}"
        raise TypeError(f"{rule}: both are [.,.,.,H] with one H")
    if q.shape[2] % k.shape[2]:
        rule = f"{name} has {q.shape[2]} heads of queries and {k.shape[2]} of keys"
        raise TypeError(f"{rule}: the second divides the first, or repeat keys in expand")
    return k, v


def refuse_result(block: nn.Module, x: Tensor, y: Tensor) -> None:
    """Refuse a result of ``mix`` that is not [B,T,D].

    Raises:
        TypeError
    """
    if y.shape != x.shape:
        rule = f"{type(block).__name__}.mix gives {_shape(y)} of x of shape {_shape(x)}"
        raise TypeError(f"{rule}: it returns [B,T,D]. attend gives [B,T,N,V], for W_o(y.flatten(-2))")


def refuse_other_shapes(block: nn.Module, made: Layout, given: Layout) -> None:
    """Refuse what a cache was not made for.

    Raises:
        TypeError
    """
    if made.slots() != given.slots():
        rule = f"{type(block).__name__} has a cache for {made.slots()}, and its mix remembers {given.slots()}"
        raise TypeError(f"{rule}: memory() must say the same")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))
