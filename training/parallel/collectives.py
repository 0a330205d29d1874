"""Collectives that gradients pass through, each the other's way back, and the norm of gradients over ranks.

Clipping takes sparse gradients too, and parameters that are distributed over ranks in different ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor, Replicate

from blockwright.blocks.memory import numbers
from blockwright.training.parallel.local import plain


def _wait(tensor: Tensor) -> Tensor:
    return tensor.wait() if isinstance(tensor, functional.AsyncCollectiveTensor) else tensor


def _each(start: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A collective of each part; all are under way before the first is waited for.

    On a CPU one after the other: of two that were under way together, gloo once waited for ever for one, on all ranks.
    """
    if parts and parts[0].is_cpu:
        return tuple(_wait(start(part.contiguous())) for part in parts)
    return tuple(map(_wait, [start(part.contiguous()) for part in parts]))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _wait(functional.all_reduce(grad.contiguous(), "sum", ctx.group)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _wait(functional.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def enter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Start of different computations on the ranks from the same x, whose gradient is the sum of theirs."""
    return _Enter.apply(x, group)


def leave(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' parts, equal on all ranks."""
    return _Leave.apply(x, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, received: list[int], sent: list[int], group: ProcessGroup, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _travel(parts, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_travel(grads, ctx.sent, ctx.received, ctx.group)


def _travel(parts: Sequence[Tensor], received: list[int], sent: list[int], group: ProcessGroup) -> tuple[Tensor, ...]:
    return _each(lambda part: functional.all_to_all_single(part, received, sent, group), parts)


def exchange(received: list[int], sent: list[int], group: ProcessGroup, *parts: Tensor) -> tuple[Tensor, ...]:
    """Rows [Σ sent, …], sorted by the rank they go to → rows [Σ received, …], sorted by the rank they come from."""
    return _Exchange.apply(received, sent, group, *parts)


def exchange_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows go to each rank [n] → how many come from each [n]."""
    return _wait(functional.all_to_all_single(counts, None, None, group))


# torch 2.13 renames them
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return _each(lambda part: _all_gather(part, 0, group), parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_each(lambda grad: _reduce_scatter(grad, "sum", 0, ctx.group), grads)


def gather(group: ProcessGroup, *parts: Tensor) -> tuple[Tensor, ...]:
    """[m,…] of each rank → [n·m,…] of all n ranks, in their order; a part's gradient is the sum of all ranks'.

    All are one step of the backward pass: ranks whose graphs differ otherwise still communicate in the same order.
    """
    return _Gather.apply(group, *parts)


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
