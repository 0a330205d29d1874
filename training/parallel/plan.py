"""Collect the blocks' ``parallel_plan()``: where tensor parallelism splits a decoder.

A *region* is the outermost block with ``row`` in its own plan: an attention, a dense ffn. Within it each rank computes
with its part of the parameters, from the same input to a summand of the output. Replicated parameters of a region get
a part of their gradient on each rank. Stacks of experts are separate regions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from blockwright.blocks.base import Block, Placement
from blockwright.blocks.linear import placement

DIMENSION = {"column": 0, "row": 1, "expert": 0}  # the dimension that each placement splits


@dataclass(frozen=True)
class Part:
    """One parameter of a region.

    Args:
        module: that contains it
        name: in that module
        placement: how it is split
        once: whether it is added to the region's output, and so must count once, not once per rank
    """

    module: nn.Module
    name: str
    placement: Placement
    once: bool

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.name]  # type: ignore[return-value] # an adapted one reads as another tensor


@dataclass(frozen=True)
class Region:
    """A block that tensor or expert parallelism splits, and all parameters in it."""

    name: str
    block: Block
    parts: tuple[Part, ...]

    @property
    def routed(self) -> bool:
        return any(part.placement == "expert" for part in self.parts)


def regions(module: nn.Module, *, dense: bool = True, routed: bool = True) -> list[Region]:
    """The regions of a module, in order.

    Args:
        module: a decoder or a part of one
        dense: whether to look for blocks that split heads or widths
        routed: whether to look for stacks of experts
    """
    found: list[Region] = []
    for name, block in module.named_modules():
        inside = any(not outer.name or name.startswith(f"{outer.name}.") for outer in found)
        if inside or not isinstance(block, Block):
            continue
        own = set(block.parallel_plan().values())
        if (dense and "row" in own) or (routed and "expert" in own):
            found.append(Region(name, block, _parts(block)))
    return found


def _parts(region: Block) -> tuple[Part, ...]:
    placements: dict[str, Placement] = {}
    for path, block in region.named_modules():
        if isinstance(block, Block):
            placements |= {f"{path}.{name}" if path else name: kind for name, kind in block.parallel_plan().items()}
    parts = []
    for name, _ in region.named_parameters():
        path, _, leaf = name.rpartition(".")
        kind = placement(name, placements)
        beside = placements.get(f"{path}.weight" if path else "weight")
        parts.append(Part(region.get_submodule(path), leaf, kind, once=leaf == "bias" and beside == "row" != kind))
    return tuple(parts)
