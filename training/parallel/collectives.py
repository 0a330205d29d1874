"""Collectives that gradients pass through: each is the other's way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional


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
