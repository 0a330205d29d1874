"""Where a decoder is split, by its blocks' ``parallel_plan()``; and parameters that are local while a block computes.

A *region* is the outermost block with ``row`` in its own plan: an attention, a dense ffn. Within it each rank computes
with its part of the parameters, from the same input to a summand of the output. Replicated parameters of a region get
a part of their gradient on each rank. Stacks of experts are separate regions.

Distributed parameters are replaced by their local parts while a block computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from blockwright.blocks.base import Block
from blockwright.blocks.base import Placement as Planned
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
    placement: Planned
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
    placements: dict[str, Planned] = {}
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


def distribute(part: Part, mesh: DeviceMesh) -> None:
    """Replace a whole parameter, equal on all ranks, by a distributed one of which each rank keeps its part."""
    whole = part.parameter
    placement: Placement = Shard(DIMENSION[part.placement]) if part.placement in DIMENSION else Replicate()
    placements = [placement] * mesh.ndim
    setattr(part.module, part.name, nn.Parameter(own_part(whole.detach(), mesh, placements), whole.requires_grad))


def own_part(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor that every rank has → the distributed one, without communication."""
    if all(isinstance(p, Replicate) for p in placements):
        local = whole
    else:
        shape, offset = own_place(whole, mesh, placements)
        local = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].clone()
    local = local if local.is_meta else local.to(mesh.device_type)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def own_place(
    tensor: Tensor, mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this rank's part of a tensor; by default as it is distributed."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if isinstance(tensor, DTensor):
        mesh, placements = mesh or tensor.device_mesh, placements or tensor.placements
    if mesh is None or placements is None:
        return tuple(tensor.shape), (0,) * tensor.ndim
    return compute_local_shape_and_global_offset(tensor.shape, mesh, placements)


@contextmanager
def localised(parts: Sequence[Part], share: float = 1.0) -> Iterator[None]:
    """Context in which each parameter is this rank's part of it, with gradients flowing back.

    The gradient of a replicated part is a summand on each rank. One that is added to the output itself is divided by
    the number of ranks, since the outputs are summed.

    Args:
        parts: the parameters
        share: factor on their gradients
    """
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for part in parts:
            registered = part.module._parameters
            distributed = registered[part.name]
            held.append((registered, part.name, distributed))
            registered[part.name] = _local(distributed, part, share)  # type: ignore[assignment]
        yield
    finally:
        for registered, name, distributed in held:
            registered[name] = distributed


def _local(parameter: Any, part: Part, share: float) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    replicated = [isinstance(p, Replicate) for p in parameter.placements]
    gradients = [Partial() if whole else p for whole, p in zip(replicated, parameter.placements, strict=True)]
    local = parameter.to_local(grad_placements=gradients)
    if share != 1 and local.requires_grad:
        local.register_hook(lambda gradient: gradient * share)
    return local / parameter.device_mesh.size() if part.once else local


def plain(tensor: Tensor) -> Tensor:
    """The local numbers of a tensor that may be distributed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_distributed(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def is_low(module: nn.Module) -> bool:
    """Whether a module's weights have fewer than 32 bits."""
    return any(p.is_floating_point() and p.itemsize < 4 for p in module.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be distributed; must be called on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- gather sharded weights once for many forward passes ---


@contextmanager
def gathered(decoder: nn.Module) -> Iterator[None]:
    """Context in which FSDP2 keeps the weights that it gathers: generation would gather every layer for every token.

    Every rank then holds whole layers, but of experts its own. Does nothing to a decoder that is not sharded.
    """
    sharded = [m for m in decoder.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not decoder, recurse=False)  # the outermost is never reshared
            module.reshard()
