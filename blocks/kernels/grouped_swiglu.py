"""Experts that are SwiGLU networks, in one pass over the tokens of each: the fast path of a CPU.

Time goes where memory does. Each expert's tokens are gathered, multiplied, activated, weighed and multiplied again
while they are in the cache; nothing but the two halves of the hidden layer is kept for the way back, which gathers the
tokens again. Each expert's weight gradient is written in place into the stack's: slicing a stack under autograd makes
a gradient of the whole stack for every expert. The router's weight multiplies the hidden vector, the narrow side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels.grouped_matmul import Order, combine, dispatch, grouped_matmul

ROWS = 1024  # of an expert at a time: with 512 inputs, what they need stays in a second-level cache of a MiB or two


class _Block(NamedTuple):
    """Some consecutive rows of one expert; ``first`` when no rows of it came before."""

    expert: int
    rows: slice
    first: bool


def _blocks(ends: list[int]) -> Iterator[_Block]:
    start = 0
    for expert, end in enumerate(ends):
        for begin in range(start, end, ROWS):
            yield _Block(expert, slice(begin, min(begin + ROWS, end)), begin == start)
        start = end


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
        F_, tokens, ends = down.shape[2], order.sorted // order.k, order.ends.tolist()
        halves, rows = x.new_empty(len(tokens), 2 * F_), x.new_empty(len(tokens), x.shape[1])
        for expert, part, _ in _blocks(ends):
            gate, up = torch.mm(x.index_select(0, tokens[part]), gate_up[expert].t(), out=halves[part]).split(F_, 1)
            hidden = F.silu(gate).mul_(up).mul_(weights[part, None])
            torch.mm(hidden, down[expert].t(), out=rows[part])
        ctx.save_for_backward(x, weights, gate_up, down, tokens, halves)
        ctx.order, ctx.ends = order, ends
        return _sum_choices(rows, order, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, weights, gate_up, down, tokens, halves = ctx.saved_tensors
        F_ = down.shape[2]
        grad_gate_up, grad_down, grad_weights = (torch.empty_like(t) for t in (gate_up, down, weights))
        rows = x.new_empty(len(tokens), x.shape[1])
        for expert, part, first in _blocks(ctx.ends):
            inputs, grads = (t.index_select(0, tokens[part]) for t in (x, grad))
            gate, up = halves[part].split(F_, 1)
            weight, silu = weights[part, None], F.silu(gate)
            back, hidden = grads @ down[expert], silu * up
            torch.sum(back * hidden, 1, out=grad_weights[part])
            _outer(grads, hidden.mul_(weight), grad_down[expert], first)
            back.mul_(weight)
            both = torch.empty_like(halves[part])
            torch.mul(back, silu, out=both[:, F_:])
            both[:, :F_] = torch.ops.aten.silu_backward(back.mul_(up), gate)
            _outer(both, inputs, grad_gate_up[expert], first)
            torch.mm(both, gate_up[expert], out=rows[part])
        for expert in _idle(ctx.ends):
            grad_gate_up[expert].zero_()
            grad_down[expert].zero_()
        return _sum_choices(rows, ctx.order, tokens), grad_weights, grad_gate_up, grad_down, None


def _outer(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    """out = leftᵀ · right for an expert's first rows, and added to for its further ones."""
    if first:
        torch.mm(left.t(), right, out=out)
    else:
        out.addmm_(left.t(), right)


def _idle(ends: list[int]) -> list[int]:
    return [expert for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if start == end]


def _sum_choices(rows: Tensor, order: Order, tokens: Tensor) -> Tensor:
    """Sorted rows [M,D] → [T,D]."""
    if order.place is None:
        return rows.new_zeros(order.n_tokens, rows.shape[1]).index_add_(0, tokens, rows)
    if order.k == 1:
        return rows.index_select(0, order.place)
    return F.embedding_bag(order.place.view(-1, order.k), rows, mode="sum")


def grouped_swiglu(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
    """Σ over a token's experts of weight · W_down,e (silu(W_gate,e x) ⊙ W_up,e x).

    Args:
        x: [T,D]
        weights: [M] of each (token, choice) pair, in sorted order
        gate_up: [E,2F,D], the gate's rows first
        down: [E,D,F]
        order: of the pairs, from ``sort_by_expert``

    Returns:
        [T,D]
    """
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = (t.to(low) if t.dtype == torch.float32 else t for t in (x, gate_up, down))
    return _GroupedSwiGLU.apply(x, weights.to(x.dtype), gate_up, down, order)


def grouped_swiglu_reference(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
    """The same from ``dispatch``, ``grouped_matmul`` and ``combine``: what a GPU and a compiler run."""
    gate, up = grouped_matmul(dispatch(x, order), gate_up, order.ends).chunk(2, -1)
    hidden = F.silu(gate) * up * weights.to(gate.dtype)[:, None]
    return combine(grouped_matmul(hidden, down, order.ends), order)
