"""The check that no hyper-parameter is a dummy: an ablation over one that changes nothing is a false result."""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import registry
from blocks.conformance.behaviour import states
from blocks.conformance.construction import move_gates
from blocks.conformance.setting import Setting, filled, tokens
from blocks.conformance.verdict import ExemptError, must
from blocks.decoder import Decoder
from registry import ConfigError
from registry.schema import Parameter

Node = dict[str, Any]
FEW = 5  # values of a parameter that are tried where two are changed


def every_hyperparameter(setting: Setting) -> None:
    """Of each parameter of the schema, children included, some other valid value changes the outputs, the losses, the
    gradients, the state, the number of parameters or the bytes of the cache. Values are tried by themselves, then
    beside another value of each other parameter: a limit on groups shows only where there are groups."""
    parameters = setting.entry.schema.parameters
    if not parameters:
        raise ExemptError("it has no parameters")
    for p in parameters.values():
        must(_matters(setting, p), f"{p.name} changes nothing, whatever its value")


def _matters(setting: Setting, p: Parameter) -> bool:
    """Whether two values of it give different models, all else being the same."""
    usual = setting.node()
    for node, few in itertools.chain([(usual, None)], ((node, FEW) for node in _beside(setting, usual, p))):
        base = _trace(setting, node)
        for value in itertools.islice(_valid(setting, node, p), few):
            if not _same(base, _trace(setting, {**node, p.name: value})):
                return True
    return False


def _beside(setting: Setting, usual: Node, p: Parameter) -> Iterator[Node]:
    """The usual node with another value of one other parameter: the first of each, then the second of each, …"""
    others = [q for q in setting.entry.schema.parameters.values() if q is not p]
    values = [[{**usual, q.name: v} for v in itertools.islice(_valid(setting, usual, q), FEW)] for q in others]
    for rank in itertools.zip_longest(*values):
        yield from (node for node in rank if node is not None)


def _valid(setting: Setting, node: Node, p: Parameter) -> Iterator[Any]:
    """Other values that the block accepts, beside what else the node says."""
    for value in alternatives(p, node.get(p.name, None if p.required else p.default)):
        try:
            setting.decoder({**node, p.name: value})
        except ConfigError:
            continue
        yield value


def alternatives(p: Parameter, value: Any) -> Iterator[Any]:
    """Values of a parameter other than this one that conform to its annotation, likely ones first."""
    if p.child:
        candidates: Iterator[Any] = itertools.chain(_children(p.child), [None] if p.optional else [])
    else:
        candidates = (v for part in _parts(p.hint) for v in _of_type(part, value))
    seen: list[Any] = [value]
    for candidate in candidates:
        if (p.child or p.fault(candidate) is None) and not any(type(candidate) is type(s) and candidate == s for s in seen):
            seen.append(candidate)
            yield candidate


def _children(kind: str) -> Iterator[Node]:
    """Nodes of the blocks of a kind, then the same with other values of their own parameters: a kind may have one."""
    usual = [filled(registry.lookup(kind, name)) for name in registry.names(kind)]
    yield from usual
    for node in usual:
        for q in registry.lookup(kind, node["name"]).schema.parameters.values():
            if not q.child:
                yield from ({**node, q.name: v} for v in alternatives(q, node.get(q.name, q.default)))


def _parts(hint: Any) -> list[Any]:
    unions = (typing.Union, types.UnionType)
    return [i for a in typing.get_args(hint) for i in _parts(a)] if typing.get_origin(hint) in unions else [hint]


def _of_type(hint: Any, value: Any) -> list[Any]:
    """Candidates of one annotation, near the value if it is a number."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if hint is bool:
        return [True, False]
    if hint is type(None):
        return [None]
    if hint is int:
        near = [2 * value, value // 2, value + 1, value - 1] if type(value) is int else []
        return [*near, 2, 4, 1, 3, 8, 24, 0]
    if hint is float:
        near = [2.0 * value, value / 2, 1000.0 * value, value + 1.0, -value] if type(value) in (int, float) else []
        return [*near, 0.5, 1.0, 2.0, 0.0, 0.1, 10.0]
    if (typing.get_origin(hint) or hint) in (list, tuple) and isinstance(value, list | tuple):
        inner = [[*value[:i], v, *value[i + 1 :]] for i, item in enumerate(value) for v in _of_type(type(item), item)]
        return [*inner, [*value, *value[-1:]], list(value[:-1])]
    if (typing.get_origin(hint) or hint) is dict and isinstance(value, Mapping):
        return [{**value, key: v} for key, item in value.items() for v in _of_type(type(item), item)]
    return []


def _trace(setting: Setting, node: Mapping[str, Any]) -> list[Any]:
    """Everything in which two models may differ that their user would see."""
    decoder, ids = setting.decoder(node), tokens(2, 13)
    seen: list[Any] = [[tuple(p.shape) for p in decoder.parameters()], _cache_bytes(decoder), states(decoder, ids)]
    torch.manual_seed(0)
    hidden, routings = decoder.train().hidden(ids)
    losses = [x for r in routings if r is not None for x in r.losses.values()]
    torch.stack([decoder.nll(hidden, ids.roll(-1, 1)), *losses]).sum().backward()
    seen += [hidden, *losses, *(p.grad for p in decoder.parameters() if p.grad is not None)]
    for _ in range(3):
        move_gates(decoder)
    return [*seen, *decoder.buffers(), states(decoder.eval(), ids)]


def _cache_bytes(decoder: Decoder) -> int | None:
    try:
        return sum(c.nbytes for c in decoder.new_caches(1, 64))
    except NotImplementedError:
        return None


def _same(one: list[Any], other: list[Any]) -> bool:
    """Whether two traces are equal. Values that are not finite prove nothing, so they count as no difference."""
    finite = all(bool(torch.isfinite(t).all()) for t in other if isinstance(t, Tensor) and t.is_floating_point())
    return not finite or (len(one) == len(other) and all(map(_equal, one, other)))


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
