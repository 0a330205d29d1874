"""The check that null for a child means none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from blockwright import registry
from blockwright.blocks.base import Block
from blockwright.blocks.compose import assemble, check
from blockwright.blocks.conformance.alternatives import valid
from blockwright.blocks.conformance.setting import Setting
from blockwright.blocks.conformance.verdict import ExemptError, must
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.model_config import read
from blockwright.registry import ConfigError
from blockwright.registry.schema import Parameter


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
