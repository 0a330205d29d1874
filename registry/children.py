"""Resolve the nodes of a block's children: the block's own, the model's, or none.

For a parameter that takes a child, there are three forms:

    qk_norm: per_head      this block; a mapping without a name patches the outer one
    qk_norm: null          none, even if the model has one; refused if the block requires it
    qk_norm: inherit       the model's, if any: the same as omitting the key
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockwright.registry.errors import ConfigError
from blockwright.registry.layout import patched
from blockwright.registry.schema import INHERIT, Parameter


@dataclass(frozen=True)
class Node:
    """A node of the configuration and its path."""

    value: Any
    path: str


def child_nodes(
    kind: str, name: str, p: Parameter, own: Node, scope: Mapping[str, Node], default: Any = None
) -> list[Node]:
    """The nodes of a parameter's children: one, several for a list, empty for none.

    A child is looked up outward: in the block's own node; then in the scope by the parameter's name; then, unless the
    parameter may be None, in the scope by the child's kind; last, it is the block's default. The default comes before
    the scope where the child is of the block's own kind: the one in the scope is then the block itself.

    Args:
        kind, name: of the block
        p: a parameter that takes a child
        own: its value in the block's node; ``inherit`` if absent
        scope: parameter name or kind → the node in effect
        default: node of the child where none is named; None for none

    Raises:
        ConfigError: null for a required child
    """
    if own.value is None:
        if not p.optional:
            remedy = f"Leave it out for the model's own {p.child}, or name a registered one"
            raise ConfigError(own.path, "null", f"{kind} {name!r} requires a block of kind {p.child}", remedy)
        return []
    if p.many and isinstance(own.value, list):
        return [Node(item, f"{own.path}.{i}") for i, item in enumerate(own.value)]
    around = scope.get(p.name) or (None if p.optional else scope.get(p.child or ""))
    if default is not None and (around is None or around.value is None or kind == p.child):
        around = Node(default, own.path)
    if around is None or around.value is None:
        return [] if own.value == INHERIT else [own]
    if own.value == INHERIT:
        return [around]
    if isinstance(own.value, Mapping) and "name" not in own.value:
        outer = {"name": around.value} if isinstance(around.value, str) else around.value
        return [Node(patched(outer, own.value), own.path)]
    return [own]
