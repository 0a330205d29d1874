"""Boxes of a picture from blocks that were built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.sample import signature
from blockwright.lab.drawing.caching import cached
from blockwright.lab.drawing.equations import equations
from blockwright.lab.drawing.labels import lines
from blockwright.lab.drawing.parts import Box
from blockwright.registry.recording import Built

Records = Mapping[int, Built]


def box(block: nn.Module, path: str, slot: str, records: Records) -> Box:
    """The box of a block, with those of its children.

    Args:
        block: built by the registry
        path, slot: as in ``Box``
        records: of all blocks (registry/recording.py)
    """
    built = records[id(block)]
    drawn = block.drawn() if isinstance(block, Block) else Drawn()
    used = ((slot, child) for slot, child in built.slots() if _used(child, block))
    children = (box(child, f"{path}.{slot}", slot, records) for slot, child in used)
    return Box(
        path,
        built.entry.kind,
        slot,
        built.entry.name,
        built.entry.schema.summary,
        built.path,
        lines(built, drawn),
        drawn.acts,
        drawn.chosen,
        dict(built.settings),
        count(block),
        _cached(block),
        tuple(children),
        equations(type(block)),
        empty=isinstance(block, Block) and block.empty,
    )


def part(path: str, kind: str, *items: str, parameters: int = 0) -> Box:
    """The box of a part of the decoder that is no block."""
    return Box(path, kind, path.rpartition(".")[2], lines=items, parameters=parameters)


def count(module: nn.Module | None) -> int:
    """Parameters of a module."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _used(child: nn.Module, block: nn.Module) -> bool:
    """Whether a block has a child in it, or copies of it, as a tower has of what each of its layers needs."""
    alike = [module for module in block.modules() if type(module) is type(child)]
    return any(module is child for module in alike) or signature(child) in map(signature, alike)


def _cached(block: nn.Module) -> Any:
    try:
        return cached(block)
    except NotImplementedError:  # a memory without reach; a plug-in's attention may have no cache
        return ()
