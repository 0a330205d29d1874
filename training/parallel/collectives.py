"""Collectives that gradients pass through: each is the other's way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional


def _wait(tensor: Tensor) -> Tensor:
    return tensor.wait() if isinstance(tensor, functional.AsyncCollectiveTensor) else tensor


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
    """Where ranks begin to compute different parts from the same x: its gradient is the sum of theirs."""
    return _Enter.apply(x, group)


def leave(x: Tensor, group: ProcessGroup) -> Tensor:
    """Where their parts are summed, and all ranks go on with the same."""
    return _Leave.apply(x, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _wait(functional.all_to_all_single(rows.contiguous(), received, sent, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = functional.all_to_all_single(grad.contiguous(), ctx.sent, ctx.received, ctx.group)
        return _wait(back), None, None, None


def exchange(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Rows [Σ sent, …], sorted by the rank they go to → rows [Σ received, …], sorted by the rank they come from."""
    return _Exchange.apply(rows, received, sent, group)


def exchange_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows go to each rank [n] → how many come from each [n]."""
    return _wait(functional.all_to_all_single(counts, None, None, group))
