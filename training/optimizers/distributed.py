"""Matrices that are spread over ranks: their local parts, their gradients, and what is summed over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local(tensor: Any) -> Any:
    """The part of this rank; anything that is not distributed, as it is."""
    return tensor.to_local() if isinstance(tensor, Tensor) and hasattr(tensor, "to_local") else tensor


def gradient(parameter: Tensor) -> Tensor:
    """The gradient, placed like its parameter: tensor parallelism may leave partial sums."""
    grad: Any = parameter.grad
    placements = getattr(parameter, "placements", None)
    if getattr(grad, "placements", None) != placements:
        return grad.redistribute(placements=placements)
    return grad


def cuts(parameter: Tensor, dims: tuple[int, ...] = (-2, -1)) -> bool:
    """Whether the parameter has a shard along one of ``dims``; by default, along a side of its matrices."""
    sides = {dim % parameter.ndim for dim in dims}
    return any(getattr(placement, "dim", None) in sides for placement in getattr(parameter, "placements", ()))


def whole(part: Tensor, parameter: Any) -> Tensor:
    """All of a tensor of the shape of a parameter, of which this rank has the part that it has of the parameter."""
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    spread = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    return spread.full_tensor()


def part_of(tensor: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a tensor that every rank has whole; without communication."""
    from torch.distributed.tensor import distribute_tensor

    spread = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return local(spread)


def placed(state: Tensor, parameter: Any, dims: tuple[int, ...] = (-2, -1)) -> Tensor:
    """State of this rank's part of a parameter, of which ``dims`` are whole and the others are spread as it is.

    A checkpoint then holds the state of all ranks. Of a parameter that is not distributed, the state as it is.
    """
    if not hasattr(parameter, "placements"):
        return state
    from torch.distributed.tensor import DTensor, Replicate

    kept = {dim % parameter.ndim for dim in dims}
    placements = [Replicate() if getattr(p, "dim", None) in kept else p for p in parameter.placements]
    shape = torch.Size(n if d in kept else parameter.shape[d] for d, n in enumerate(state.shape))
    stride = torch.empty(shape, dtype=torch.float32, device="meta").stride()
    return DTensor.from_local(state, parameter.device_mesh, placements, shape=shape, stride=stride)


def norms(part: Tensor, parameter: Any, dims: tuple[int, ...] = (-2, -1)) -> Tensor:
    """√Σ x² over ``dims``, which are kept, of a tensor of which this rank has the part that it has of the parameter."""
    squares = part.to(torch.promote_types(part.dtype, torch.float32)).square().sum(dims, keepdim=True)
    if cuts(parameter, dims):
        squares = _summed(squares, parameter, dims)
    return squares.sqrt()


def _summed(squares: Tensor, parameter: Any, dims: tuple[int, ...]) -> Tensor:
    """Sums of the parts of all ranks among which ``dims`` are cut."""
    from torch.distributed._functional_collectives import all_reduce

    sides = {dim % parameter.ndim for dim in dims}
    for axis, placement in enumerate(parameter.placements):
        if getattr(placement, "dim", None) in sides:
            squares = all_reduce(squares, "sum", (parameter.device_mesh, axis))
    return squares
