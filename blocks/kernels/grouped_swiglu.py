"""Experts that are SwiGLU networks, in one pass over the tokens of each: the fast path of a CPU.

Time goes where memory does. Each expert's tokens are gathered, multiplied, activated, weighed and multiplied again
while they are in the cache; nothing but the two halves of the hidden layer is kept for the way back, which gathers the
tokens again. Each expert's weight gradient is written in place into the stack's: slicing a stack under autograd makes
a gradient of the whole stack for every expert. The router's weight multiplies the hidden vector, the narrow side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels.grouped_matmul import Order, combine, dispatch, grouped_matmul

ROWS = 1024  # of an expert at a time: with 512 inputs, what they need stays in a second-level cache of a MiB or two


class _Block(NamedTuple):
    """Consecutive rows of one expert, ``real`` of them; what ``rows`` has beyond those is computed and not used.

    ``first`` when no rows of this expert came before.
    """

    expert: int
    rows: slice
    real: int
    first: bool


def _blocks(ends: list[int], rounded: bool) -> list[_Block]:
    found, start = [], 0
    for expert, end in enumerate(ends):
        for begin in range(start, end, ROWS):
            real = min(ROWS, end - begin)
            length = round_up(real) if rounded else real
            found.append(_Block(expert, slice(begin, begin + length), real, begin == start))
        start = end
    return found


def round_up(rows: int) -> int:
    """The next of few lengths: oneDNN compiles a kernel for every new shape, for a millisecond and half a MiB.

    Rows beyond an expert's own are the next expert's, which overwrites them when its turn comes.
    """
    multiple = 16 if rows < 128 else 32 if rows < 512 else 64
    return -(-rows // multiple) * multiple


def _compiles_shapes(dtype: torch.dtype) -> bool:
    """Whether products of this precision go to oneDNN; MKL takes any shape as it comes."""
    return dtype.itemsize == 2 or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
        F_, ends, rounded = down.shape[2], order.ends.tolist(), _compiles_shapes(x.dtype)
        blocks = _blocks(ends, rounded)
        beyond = blocks[-1].rows.stop - len(order.sorted) if blocks else 0
        tokens, weights = (F.pad(t, (0, beyond)) for t in (order.sorted // order.k, weights))
        halves, rows = x.new_empty(len(tokens), 2 * F_), x.new_empty(len(tokens), x.shape[1])
        for expert, part, _, _ in blocks:
            gate, up = torch.mm(x.index_select(0, tokens[part]), gate_up[expert].t(), out=halves[part]).split(F_, 1)
            hidden = F.silu(gate).mul_(up).mul_(weights[part, None])
            torch.mm(hidden, down[expert].t(), out=rows[part])
        ctx.save_for_backward(x, weights, gate_up, down, tokens, halves)
        ctx.order, ctx.ends, ctx.blocks = order, ends, blocks
        return _sum_choices(rows, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, weights, gate_up, down, tokens, halves = ctx.saved_tensors
        F_ = down.shape[2]
        grad_gate_up, grad_down, grad_weights = (torch.empty_like(t) for t in (gate_up, down, weights))
        rows = x.new_empty(len(tokens), x.shape[1])
        for expert, part, real, first in ctx.blocks:
            inputs, grads = (t.index_select(0, tokens[part]) for t in (x, grad))
            gate, up = halves[part].split(F_, 1)
            weight, silu = weights[part, None], F.silu(gate)
            back, hidden = grads @ down[expert], silu * up
            torch.sum(back * hidden, 1, out=grad_weights[part])
            weight = F.pad(weight[:real], (0, 0, 0, part.stop - part.start - real))  # others' rows count for nothing
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
        pairs = len(ctx.order.sorted)
        return _sum_choices(rows, ctx.order), grad_weights[:pairs], grad_gate_up, grad_down, None


def _outer(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    """out = leftᵀ · right for an expert's first rows, and added to for its further ones."""
    if first:
        torch.mm(left.t(), right, out=out)
    else:
        out.addmm_(left.t(), right)


def _idle(ends: list[int]) -> list[int]:
    return [expert for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if start == end]


def _sum_choices(rows: Tensor, order: Order) -> Tensor:
    """Sorted rows [M,D], and what may follow them, → [T,D]."""
    if order.place is None:
        pairs = order.sorted
        return rows.new_zeros(order.n_tokens, rows.shape[1]).index_add_(0, pairs // order.k, rows[: len(pairs)])
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
