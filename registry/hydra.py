"""Blocks and presets as Hydra options, which src/hydra_plugins/blockwright_registry offers to Hydra.

* ``<root>/<kind>=NAME``: a registered block with typed parameters. The root of most kinds is ``model``; ``@family``
  names that of others. A kind at the root of a configuration is chosen by ``<kind>=NAME``, ``task=NAME``
* ``model=NAME``: a preset, which selects its blocks by groups, so that each can be swapped
* ``settings=registered``: every block that is a setting at the root of a configuration, unset; each is a group, whose
  options are files
* ``model/<kind>=of/NAME``: a preset's block with its values, typed likewise. Only these have a ``/`` in their name, so
  a sweep over ``glob(*)`` covers registered blocks only.

Nodes are made when selected: a program reads no preset but its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from blockwright.registry import catalogue, presets
from blockwright.registry.build import Node, resolve

BASE = "base"  # conf/model/base.yaml: the keys of a model that are not blocks


def is_group(path: str) -> bool:
    """Whether the registry has options below a path."""
    match _parts(path):
        case ["model", kind, "of"]:
            return kind in catalogue.kinds()
        case ["settings"]:
            return True
        case [root] if root:
            return bool(catalogue.kinds(root)) or root in catalogue.kinds(catalogue.ROOT)
        case [root, kind]:
            return kind in catalogue.kinds(root)
    return False


def listed(path: str, which: ObjectType | None) -> list[str]:
    """Groups or options below a path, or both. Groups omit ``of``, or --help would list every preset once per kind."""
    groups: list[str] = []
    options: list[str] = []
    match _parts(path):
        case ["model", kind, "of"]:
            options = presets.names(kind)
        case [root]:
            groups = catalogue.kinds(root)
            options = presets.names() if root == "model" else _at_the_root(root)
        case [root, kind] if kind in catalogue.kinds(root):
            options = catalogue.names(kind)
    if which is None:
        return sorted({*groups, *options})
    return groups if which == ObjectType.GROUP else options


def _parts(path: str) -> list[str]:
    return path.removesuffix(".yaml").strip("/").split("/")


def maker(path: str) -> Callable[[], DictConfig] | None:
    """A function that makes the node of the option at a path; None where there is no such option."""
    match _parts(path):
        case ["model", name] if presets.exists(name):
            return lambda: _model(name)
        case ["settings", "registered"]:
            return _settings
        case [kind, name] if name in _at_the_root(kind):
            return lambda: _typed(kind, name)
        case [root, kind, name] if kind in catalogue.kinds(root) and name in catalogue.names(kind):
            return lambda: _typed(kind, name)
        case ["model", kind, "of", name] if kind in catalogue.kinds() and presets.exists(name):
            node = presets.read(name).get(kind)
            return None if node is None else lambda: _part(kind, node)
    return None


def _at_the_root(kind: str) -> list[str]:
    return catalogue.names(kind) if kind in catalogue.kinds(catalogue.ROOT) else []


def _typed(kind: str, name: str) -> DictConfig:
    return OmegaConf.structured(catalogue.lookup(kind, name).schema.dataclass)


def _model(name: str) -> DictConfig:
    """A preset: its blocks as selections, and its other keys over the base configuration."""
    model = presets.read(name)
    chosen = [kind for kind in catalogue.kinds() if model.get(kind) is not None]
    own = {key: value for key, value in model.items() if key not in catalogue.kinds()}
    return OmegaConf.create({"defaults": [BASE, *({kind: f"of/{name}"} for kind in chosen), "_self_"], **own})


def _settings() -> DictConfig:
    """Every setting that is a registered block, unset: with its group in the defaults, its options can be chosen."""
    names = catalogue.settings()
    return OmegaConf.create({"defaults": ["_self_", *({f"/{name}": None} for name in names)], **dict.fromkeys(names)})


def _part(kind: str, node: Any) -> DictConfig:
    """A preset's block, validated and typed like the registered block."""
    entry, _ = resolve(kind, Node(node, f"model.{kind}"))
    typed = OmegaConf.structured(entry.schema.dataclass)
    return typed if isinstance(node, str) else OmegaConf.merge(typed, node)  # type: ignore[return-value]
