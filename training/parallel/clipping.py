"""Norm and clipping of all gradients, sparse ones too, for parameters distributed over ranks in different ways."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from blockwright.blocks.memory import numbers
from blockwright.training.parallel.local import plain


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, the same on every rank; fp32 at least.

    Each rank sums its squares, divided by the number of ranks that hold the same ones; one sum over the world then
    works for any mix of meshes.
    """
    stepped = [p for p in parameters if p.grad is not None]
    if not stepped:
        return torch.zeros((), dtype=torch.float32)
    if not any(isinstance(_spread(p), DTensor) for p in stepped):
        return _norm([_numbers(p) for p in stepped])
    world = dist.get_world_size()
    by_copies: dict[float, list[Tensor]] = {}
    for parameter in stepped:
        by_copies.setdefault(world / _pieces(_spread(parameter)), []).append(_numbers(parameter).detach())
    squares = [_norm(alike).double().square() / copies for copies, alike in by_copies.items()]
    total = torch.stack(squares).sum()
    if world > 1:
        device = next(t.device_mesh.device_type for t in map(_spread, stepped) if isinstance(t, DTensor))
        total = total.to(device)  # offloaded gradients are on the CPU, which a GPU's process group cannot reduce
        dist.all_reduce(total)
    return total.sqrt().float()


def _norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all plain tensors together, in at least fp32."""
    norms = torch._foreach_norm(gradients, 2.0, torch.promote_types(gradients[0].dtype, torch.float32))
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def clip(parameters: Iterable[nn.Parameter], limit: float, algorithm: str = "norm") -> None:
    """Clip gradients in place: their total norm to ``limit``, or each number to ±``limit``."""
    parameters = list(parameters)
    gradients = [_numbers(p) for p in parameters if p.grad is not None]
    if not gradients:  # of a step that is skipped, on all ranks
        return
    if algorithm == "value":
        torch._foreach_clamp_max_(gradients, limit)
        torch._foreach_clamp_min_(gradients, -limit)
        return
    factor = (limit / (total_norm(parameters) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))


def has_sparse(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether some gradient is sparse, which torch's own functions do not clip."""
    return any(p.grad is not None and p.grad.is_sparse for p in parameters)


def _numbers(parameter: nn.Parameter) -> Tensor:
    """The numbers of a gradient that this rank has, each once; to change them changes the gradient."""
    gradient: Any = parameter.grad
    if gradient.is_sparse:
        gradient = parameter.grad = gradient.coalesce()
    return numbers(plain(gradient))


def _spread(parameter: nn.Parameter) -> Any:
    """What is distributed as a gradient is: sparse ones are plain tensors, of this rank's part."""
    gradient: Any = parameter.grad
    return parameter if gradient.is_sparse else gradient


def _pieces(tensor: Tensor) -> int:
    """Number of ranks over which a tensor is distributed."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, p in enumerate(tensor.placements) if not isinstance(p, Replicate))
