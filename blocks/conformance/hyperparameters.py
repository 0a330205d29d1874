"""The check that every hyper-parameter has an effect: an ablation over one without effect is a false result."""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.base import Block
from blockwright.blocks.compose import assemble, check, read
from blockwright.blocks.conformance.behaviour import states
from blockwright.blocks.conformance.construction import move_gates
from blockwright.blocks.conformance.setting import ExemptError, PromiseError, Setting, filled, must, shown, tokens
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError
from blockwright.registry.ranges import parts
from blockwright.registry.schema import Parameter

# --- other values of a block's parameters, found from its schema, and a node with every option enabled ---


Node = dict[str, Any]


def switched_on(setting: Setting) -> Node:
    """The block's node with a value for each parameter that is null or false, where the block accepts one."""
    node = setting.node()
    for p in setting.entry.schema.parameters.values():
        if not p.required and (p.optional or not p.child) and node.get(p.name, p.default) in (None, False):
            for value in itertools.islice(valid(setting, node, p), 1):
                node = {**node, p.name: value}
    return node


def valid(setting: Setting, node: Node, p: Parameter) -> Iterator[Any]:
    """Other values that the block accepts, given the rest of the node."""
    for value in alternatives(p, node.get(p.name, None if p.required else p.default)):
        try:
            check(setting.model({**node, p.name: value}))
        except ConfigError:
            continue
        yield value


def alternatives(p: Parameter, value: Any) -> Iterator[Any]:
    """Values of a parameter other than this one that match its annotation, likely ones first."""
    if p.child:
        candidates: Iterator[Any] = itertools.chain(_children(p.child), [None] if p.optional else [])
    else:
        candidates = (v for part in _parts(p.hint) for v in _of_type(part, value))
    seen: list[Any] = [value]
    for candidate in candidates:
        known = any(type(candidate) is type(s) and candidate == s for s in seen)
        if (p.child or p.fault(candidate) is None) and not known:
            seen.append(candidate)
            yield candidate


def _children(kind: str) -> Iterator[Node]:
    """Nodes of the blocks of a kind, then with other values of their parameters: a kind may have only one block."""
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
    near: list[Any]
    if hint is int:
        near = [2 * value, value // 2, value + 1, value - 1] if type(value) is int else [12]
        return [*near, 2, 4, 1, 3, 8, 24, 0]
    if hint is float:
        near = [2.0 * value, value / 2, 1000.0 * value, value + 1.0, -value] if type(value) in (int, float) else [10.0]
        return [*near, 0.5, 1.0, 2.0, 0.0, 0.1, 10.0]
    if (typing.get_origin(hint) or hint) in (list, tuple) and isinstance(value, list | tuple):
        inner = [[*value[:i], v, *value[i + 1 :]] for i, item in enumerate(value) for v in _of_type(type(item), item)]
        return [*inner, [*value, *value[-1:]], list(value[:-1])]
    if typing.get_origin(hint) is list and value is None:
        return [[v] for v in _of_type(parts(typing.get_args(hint)[0])[0], None)]
    if (typing.get_origin(hint) or hint) is dict and isinstance(value, Mapping):
        return [{**value, key: v} for key, item in value.items() for v in _of_type(type(item), item)]
    return []


# --- the check that null for a child means none ---


def null_children(setting: Setting) -> None:
    """Null for an optional child builds the block without it, even if the model has one; null for a required child is
    refused. So an ablation of a child changes the model, or is refused."""
    children = setting.entry.schema.children
    if not children:
        raise ExemptError("it has no children")
    for p in children.values():
        if p.optional:
            _goes_without(setting, p)
        else:
            _refuses(setting, p)


def _goes_without(setting: Setting, p: Parameter) -> None:
    node = {k: v for k, v in setting.node().items() if k != p.name}
    without, own = {**node, p.name: None}, setting.node().get(p.name)
    # In brief it has a child among its options already, and the decoder around it is there.
    if setting.brief and isinstance(own, Mapping) and not _around_another(str(p.child), own["name"]):
        of_the_model = {p.name: own} if p.name in registry.kinds() else {}
        none = _size(setting, {**setting.model(without), **of_the_model})
        must(none < _within(setting, setting.composed("meta")), f"{p.name} is null, and as many blocks are built")
        return
    check(setting.model(without))
    if setting.brief and own is p.default is None:  # no child suits it, or its options would have one
        return
    alone = (v for v in valid(setting, without, p) if v is not None and not _around_another(str(p.child), v["name"]))
    for child in itertools.islice(alone, 1):
        of_the_model = {p.name: child} if p.name in registry.kinds() else {}
        with_it = _size(setting, {**setting.model({**node, p.name: child}), **of_the_model})
        none = _size(setting, {**setting.model(without), **of_the_model})
        must(none < with_it, f"{p.name} is null, but as many blocks are built as with {child['name']}")


def _around_another(kind: str, name: str) -> bool:
    """Whether a block is built around one of its own kind, which would be counted too."""
    return any(p.child == kind and not p.optional for p in registry.lookup(kind, name).schema.children.values())


def _size(setting: Setting, model: dict[str, Any]) -> int:
    """The number of blocks inside the tested ones."""
    with torch.device("meta"):
        return _within(setting, assemble(read(model)))


def _within(setting: Setting, decoder: Decoder) -> int:
    return sum(isinstance(m, Block) for block in setting.instances(decoder).values() for m in block.modules())


def _refuses(setting: Setting, p: Parameter) -> None:
    try:
        check(setting.model({**setting.node(), p.name: None}))
    except ConfigError as refusal:
        must(refusal.path.endswith(f".{p.name}"), f"null for {p.name} is refused at {refusal.path}")
        return
    must(False, f"it needs {p.name}, and a null for it is not refused")


MANY = 12  # values tried per parameter, alone
FEW = 5  # values tried per parameter, in pairs


def every_hyperparameter(setting: Setting) -> None:
    """For each parameter of the schema, children included, some other valid value changes the outputs, losses,
    gradients, state, parameter count or cache bytes. Values are tried alone, then together with another value of each
    other parameter: a limit on groups has an effect only where there are groups."""
    parameters = setting.entry.schema.parameters
    if not parameters:
        raise ExemptError("it has no parameters")
    usual = _trace(setting, setting.node())
    for p in parameters.values():
        if not _matters(setting, p, usual):
            found = any(True for _ in valid(setting, setting.node(), p))
            must(found, f"no other valid value of {p.name} was found: declare its values with Literal")
            must(False, f"{p.name} changes nothing, whatever its value")


def _matters(setting: Setting, p: Parameter, usual: list[Any]) -> bool:
    """Whether two values of it give different models, all else being equal.

    Args:
        setting: of the block
        p: the parameter
        usual: trace of the usual node
    """
    node = setting.node()
    for others, few in itertools.chain([(node, MANY)], ((beside, FEW) for beside in _beside(setting, node, p))):
        base = usual if others is node else _trace(setting, others)
        for value in itertools.islice(valid(setting, others, p), few):
            try:
                other = _trace(setting, {**others, p.name: value})
            except Exception as error:
                said = " ".join(str(error).split())
                raise PromiseError(f"with {p.name}={value}: {type(error).__name__}: {said[:400]}") from error
            # Whether two traces are equal. Non-finite values prove nothing, so they count as equal.
            finite = all(
                bool(torch.isfinite(t).all()) for t in other if isinstance(t, Tensor) and t.is_floating_point()
            )
            same = not finite or (len(base) == len(other) and all(map(_equal, base, other)))
            if not same:
                return True
    return False


def _beside(setting: Setting, usual: Node, p: Parameter) -> Iterator[Node]:
    """The usual node with another value of one other parameter: the first of each, then the second of each, …"""
    others = [q for q in setting.entry.schema.parameters.values() if q is not p]
    values = [[{**usual, q.name: v} for v in itertools.islice(valid(setting, usual, q), FEW)] for q in others]
    for rank in itertools.zip_longest(*values):
        yield from (node for node in rank if node is not None)


def _trace(setting: Setting, node: Mapping[str, Any]) -> list[Any]:
    """Everything in which two models may visibly differ."""
    decoder, ids = setting.decoder(node), tokens(2, 13)
    seen: list[Any] = [[tuple(p.shape) for p in decoder.parameters()], _cache_bytes(decoder), states(decoder, ids)]
    torch.manual_seed(0)
    given, media = shown(decoder, ids)
    decoder.begin_step(0)
    hidden, routings = decoder.train().hidden(given, media=media)
    losses = [x for r in routings if r is not None for x in r.losses.values()]
    torch.stack([decoder.nll(hidden, given.roll(-1, 1)), *losses]).sum().backward()
    seen += [hidden, *losses, *(p.grad.to_dense() for p in decoder.parameters() if p.grad is not None)]
    for _ in range(3):
        move_gates(decoder)
    return [*seen, *decoder.buffers(), states(decoder.eval(), ids)]


def _cache_bytes(decoder: Decoder) -> int | None:
    try:
        return sum(c.nbytes for c in decoder.new_caches(1, 64))
    except NotImplementedError:
        return None


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
