"""Other values of a block's parameters, found from its schema, and a node with every option enabled."""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from blockwright import registry
from blockwright.blocks.compose import check
from blockwright.blocks.conformance.setting import Setting, filled
from blockwright.registry import ConfigError
from blockwright.registry.ranges import parts
from blockwright.registry.schema import Parameter

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
