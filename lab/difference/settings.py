"""Every setting of a composition as a value by its path, where it acts: ``ffn.gating.top_k`` → 6.

A block has its name at its own path (``ffn.gating`` → ``softmax_topk``), and its parameters below, defaults included. A
child that a block takes from the model stands in that block, so two compositions are alike if their blocks are,
wherever their YAML writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from blockwright import registry
from blockwright.blocks.decoder import LAYER_PARTS, Decoder
from blockwright.registry import Node, child_nodes, resolve
from blockwright.registry.layout import plan

Settings = dict[str, Any]
ELSEWHERE = ("layout", "variants", "overrides", "format")  # they choose the blocks of layers, which have settings


class Name(str):
    """The name of a block, the value at its own path; any other string is a parameter."""


def of_model(decoder: Decoder) -> Settings:
    """The settings that are not of single layers: sizes, initialisation, and the blocks around the layers."""
    config, kinds = decoder.config, registry.kinds()
    plain = {key: value for key, value in config.items() if key not in (*kinds, *ELSEWHERE)}
    nodes = {kind: Node(config[kind], f"model.{kind}") for kind in kinds if config.get(kind) is not None}
    around = {"norm": decoder.norm, "position": decoder.position, **decoder.inputs}
    built = {kind: block for kind, block in around.items() if kind in nodes}
    if not _is_below_layers(nodes.get("position")):
        built.pop("position", None)
    found = (each for kind, block in built.items() for each in _walk(kind, kind, nodes[kind], nodes, block, ()))
    return {**flat(plain), **dict(found)}


def of_layers(decoder: Decoder) -> dict[str, list[Settings]]:
    """Part of a layer (``attention``, ``ffn``, ``residual``) → the settings of each layer."""
    planned = plan(decoder.config, registry.layer_kinds(), registry.names)
    return {
        part: [_of_part(part, nodes, layer) for nodes, layer in zip(planned, decoder.layers, strict=True)]
        for part in LAYER_PARTS
    }


def _of_part(part: str, nodes: Mapping[str, dict[str, Any]], layer: nn.Module) -> Settings:
    scope = {kind: Node(node, f"model.{kind}") for kind, node in nodes.items()}
    if _is_below_layers(scope.get("position")):
        scope["position"] = Node("none", "model.position")
    return dict(_walk(part, part, scope[part], scope, getattr(layer, part), ()))


def _is_below_layers(position: Node | None) -> bool:
    """Whether a position is added to the embeddings, so that the blocks in the layers have none."""
    return position is not None and resolve("position", position)[0].cls.place == "embedding"  # type: ignore[attr-defined]


def _walk(
    path: str,
    kind: str,
    node: Node,
    scope: Mapping[str, Node],
    built: nn.Module | None,
    parents: tuple[tuple[str, str], ...],
) -> Iterator[tuple[str, Any]]:
    """A block and all in it.

    Args:
        path: of the block in its layer
        kind, node: of the block
        scope: kind → the node in effect
        built: the block itself, where its parent has it under this name
        parents: kinds and names of the blocks around it
    """
    entry, given = resolve(kind, node)
    yield path, Name(entry.name)
    for p in entry.schema.parameters.values():
        if not p.child:
            yield from flat({p.name: _settled(given[p.name], p.name, built)}, f"{path}.").items()
    around = (*parents, (kind, entry.name))
    for p in entry.schema.children.values():
        written, default = Node(given[p.name], f"{node.path}.{p.name}"), entry.cls.default_children.get(p.name)
        found = child_nodes(f"{kind} {entry.name!r}", p, written, scope, default)
        block = getattr(built, p.name, None)
        for i, inner in enumerate(found):
            at = f"{path}.{p.name}.{i}" if p.many else f"{path}.{p.name}"
            one = block[i] if p.many and isinstance(block, nn.ModuleList) else None if p.many else block
            yield from _walk(at, p.child or "", inner, scope, one, around)


def _settled(value: Any, name: str, built: nn.Module | None) -> Any:
    """A value; for null the number that the block has settled on, if it has one under the same name."""
    settled = getattr(built, name, None) if value is None else None
    return settled if isinstance(settled, int | float) else value


def flat(nested: Mapping[str, Any], prefix: str = "") -> Settings:
    """{"init": {"std": 0.02}} → {"init.std": 0.02}; lists of plain values stay whole."""
    found: Settings = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(each, Mapping | list | tuple) for each in value):
            found |= flat({str(i): each for i, each in enumerate(value)}, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
