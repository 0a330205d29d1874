"""Distributed parameters, replaced by their local parts while a block computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from blockwright.training.parallel.plan import DIMENSION, Part


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
