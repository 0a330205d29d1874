"""Which nodes a block's children are built from: its own, the model's, or none.

For a parameter that receives a child, three things can be written:

    qk_norm: per_head      this block; a mapping without a name patches the one outside
    qk_norm: null          none, whatever the model has; refused where the block cannot do without
    qk_norm: inherit       the model's own, if any: the same as leaving the key out
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.errors import ConfigError
from registry.layout import patched
from registry.schema import INHERIT, Parameter


@dataclass(frozen=True)
class Node:
    """A piece of configuration and where it stands."""

    value: Any
    path: str


def child_nodes(parent: str, p: Parameter, own: Node, scope: Mapping[str, Node]) -> list[Node]:
    """The nodes of the children for a parameter: one, several for a list, empty for none.

    A child is looked up outward: in the block's own node; then in the scope under the parameter's name; then, unless
    the parameter may be None, in the scope under the child's kind.

    Args:
        parent: kind and name of the block, for the error
        p: a parameter that receives a child
        own: what the block's node says for it; ``inherit`` where it says nothing
        scope: parameter name or kind → the node that holds there

    Raises:
        ConfigError: null for a child that the block needs
    """
    if own.value is None:
        if not p.optional:
            remedy = f"Leave it out for the model's own {p.child}, or name a registered one"
            raise ConfigError(own.path, "null", f"{parent} cannot do without a block of kind {p.child}", remedy)
        return []
    if p.many and isinstance(own.value, list):
        return [Node(item, f"{own.path}.{i}") for i, item in enumerate(own.value)]
    around = scope.get(p.name) or (None if p.optional else scope.get(p.child or ""))
    if around is None or around.value is None:
        return [] if own.value == INHERIT else [own]
    if own.value == INHERIT:
        return [around]
    if isinstance(own.value, Mapping) and "name" not in own.value:
        outer = {"name": around.value} if isinstance(around.value, str) else around.value
        return [Node(patched(outer, own.value), own.path)]
    return [own]
