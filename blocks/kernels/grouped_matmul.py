"""Expert matmuls: one sort of the tokens, then one product for all experts.

``dispatch`` orders (token, choice) pairs by expert; ``grouped_matmul`` multiplies each expert's contiguous rows by
its matrix; ``combine`` adds a token's k results. Dispatch and combine are each other's adjoint, and written as such:
both directions are gathers, with no scattered addition, so sums have one order and runs repeat to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Order(NamedTuple):
    """How T·k (token, choice) pairs are sorted by expert.

    sorted: [T·k] pair index at each sorted place
    place: [T·k] sorted place of each pair, the inverse permutation
    ends: [E] int32, the place after each expert's last row
    k: choices a token
    """

    sorted: Tensor
    place: Tensor
    ends: Tensor
    k: int


def sort_by_expert(experts: Tensor, n_experts: int) -> Order:
    """Choices [T,k] → their order by expert; ties keep the order of tokens."""
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(n_experts, dtype=torch.int64, device=pairs.device).scatter_add_(
        0, pairs, torch.ones_like(pairs)
    )
    return Order(order, place, counts.cumsum(0).to(torch.int32), experts.shape[1])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return x.index_select(0, order.sorted // order.k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.order.place).unflatten(0, (-1, ctx.order.k)).sum(1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return rows.index_select(0, order.place).unflatten(0, (-1, order.k)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.order.sorted // ctx.order.k), None


def dispatch(x: Tensor, order: Order) -> Tensor:
    """Tokens [T,D] → [T·k,D], a copy for each choice, sorted by expert."""
    return _Dispatch.apply(x, order)


def combine(rows: Tensor, order: Order) -> Tensor:
    """Sorted rows [T·k,D] → [T,D], the sum over each token's choices."""
    return _Combine.apply(rows, order)


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix.

    Args:
        rows: [M,K], sorted by expert
        weight: [E,N,K], one matrix an expert, (out, in) as nn.Linear has it
        ends: [E] int32, the row after each expert's last

    Returns:
        [M,N]
    """
    if rows.device.type == "meta":
        return rows @ weight[0].t()  # the shape and the FLOPs; on this device there are no counts to split by
    if torch.is_autocast_enabled(rows.device.type):  # F.grouped_mm is not on autocast's list, as matmul is
        low = torch.get_autocast_dtype(rows.device.type)
        rows, weight = (t.to(low) if t.dtype == torch.float32 else t for t in (rows, weight))
    fits = rows.dtype in (torch.float32, torch.bfloat16) and weight.dtype == rows.dtype
    aligned = all((n * rows.element_size()) % 16 == 0 for n in weight.shape[1:])  # what F.grouped_mm asks of strides
    if fits and aligned:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return grouped_matmul_reference(rows, weight, ends)


def grouped_matmul_reference(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same, one expert at a time: any dtype, any width."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ w.t() for part, w in zip(rows.split(counts), weight.unbind(0), strict=True)])
