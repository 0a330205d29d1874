"""Experts, Σ over a token's chosen ones of weight · SwiGLU_e(x): one sort of the tokens, then one product for all.

``dispatch`` orders (token, choice) pairs by expert; ``grouped_matmul`` multiplies each expert's contiguous rows by
its matrix; ``combine`` adds a token's k results. Dispatch and combine are each other's adjoint, and written as such:
both directions are gathers, without scattered addition, so the order of summation is fixed and runs repeat exactly. If
some pairs have no expert (tokens dropped, or experts that choose), ``take`` and ``add_up`` do the same for any rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.seam import capability_of, kernel


class Order(NamedTuple):
    """Order of T·k (token, choice) pairs sorted by expert.

    sorted: [M] pair index at each sorted position; M = T·k, or the pairs that are counted
    place: [T·k] sorted position of each pair, the inverse permutation; None if M < T·k
    ends: [E] int32, the position after each expert's last row
    n_tokens: T
    k: choices per token
    """

    sorted: Tensor
    place: Tensor | None
    ends: Tensor
    n_tokens: int
    k: int


def sort_by_expert(experts: Tensor, n_experts: int, pairs: int | None = None) -> Order:
    """Sort choices [T,k] by expert; ties keep the order of tokens.

    Rows that are sorted although they have no expert count as the last expert's: their weight is 0, and that they are
    computed costs less than a host that waits to learn how many they are.

    Args:
        experts: n_experts means no expert
        pairs: at most how many entries are below n_experts; None: all T·k
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    ends = counts[:n_experts].cumsum(0).to(torch.int32)
    ends[-1:].fill_(flat.numel() if pairs is None else pairs)
    if pairs is not None:
        return Order(order[:pairs], None, ends, *experts.shape)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Order(order, place, ends, *experts.shape)


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
        assert order.place is not None
        return rows.index_select(0, order.place).unflatten(0, (-1, order.k)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.order.sorted // ctx.order.k), None


def dispatch(x: Tensor, order: Order) -> Tensor:
    """Tokens [T,D] → [M,D], one copy per choice, sorted by expert."""
    if order.place is None:
        return take(x, order.sorted // order.k)
    return _Dispatch.apply(x, order)


def combine(rows: Tensor, order: Order) -> Tensor:
    """Sorted rows [M,D] → [T,D], the sum over each token's choices."""
    if order.place is None:
        return add_up(rows, order.sorted // order.k, order.n_tokens)
    return _Combine.apply(rows, order)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor) -> Tensor:
        ctx.token, ctx.n_tokens = token, len(x)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad, ctx.token, ctx.n_tokens), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, n_tokens: int) -> Tensor:
        ctx.token = token
        return sum_in_order(rows, token, n_tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.token), None, None


def take(x: Tensor, token: Tensor) -> Tensor:
    """Rows [M,D] of x [T,D] at indices [M]; the adjoint of ``add_up``."""
    return _Take.apply(x, token)


def add_up(rows: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    """Rows [M,D] of tokens [M] → [T,D], the sum of each token's."""
    if rows.device.type == "cuda":
        return _AddUp.apply(rows, token, n_tokens)
    return rows.new_zeros(n_tokens, rows.shape[1]).index_add(0, token, rows)


def sum_in_order(rows: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    """``add_up`` in a fixed order and at least fp32, for devices where ``index_add`` adds atomically, in varying order
    and in the dtype of the rows."""
    counts = torch.zeros(n_tokens, dtype=torch.int64, device=rows.device).scatter_add_(0, token, torch.ones_like(token))
    wide = torch.promote_types(rows.dtype, torch.float32)
    of_token = rows.index_select(0, token.argsort(stable=True)).to(wide)
    return torch.segment_reduce(of_token, "sum", lengths=counts, unsafe=True).to(rows.dtype)


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix.

    Args:
        rows: [M,K], sorted by expert
        weight: [E,N,K], one matrix per expert, (out, in) as in nn.Linear
        ends: [E] int32, the row after each expert's last

    Returns:
        [M,N]
    """
    if rows.device.type == "meta":
        return rows @ weight[0].t()  # only shape and FLOPs: the meta device has no counts to split by
    if torch.is_autocast_enabled(rows.device.type):  # autocast does not know F.grouped_mm
        low = torch.get_autocast_dtype(rows.device.type)
        rows, weight = (t.to(low) if t.dtype == torch.float32 else t for t in (rows, weight))
    if rows.is_cuda and rows.dtype == weight.dtype == torch.bfloat16 and not _grouped_mm_takes(rows, weight):
        return grouped_matmul(*aligned(rows, weight), ends).narrow(1, 0, weight.shape[1])  # else the host would wait
    if torch.compiler.is_compiling() and not (_grouped_mm_takes(rows, weight) and rows.dtype == torch.bfloat16):
        return _opaque(
            rows, weight, ends
        )  # the compiler supports F.grouped_mm in bf16 only, and the reference breaks graphs
    if not _grouped_mm_takes(rows, weight):
        return grouped_matmul_reference(rows, weight, ends)
    y = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(Tensor.contiguous)  # its backward refuses a gradient that is expanded, as that of a sum
    return y


def _grouped_mm_takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether F.grouped_mm supports these dtypes and strides."""
    fits = rows.dtype in (torch.float32, torch.bfloat16) and weight.dtype == rows.dtype
    return fits and all((n * rows.element_size()) % 16 == 0 for n in weight.shape[1:])


def aligned(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros up to widths of whole 16 bytes, as F.grouped_mm wants its strides; the product is as wide."""
    whole = 16 // rows.element_size()
    K, N = (-n % whole for n in (weight.shape[2], weight.shape[1]))
    return F.pad(rows, (0, K)), F.pad(weight, (0, K, 0, N))


def grouped_matmul_reference(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``grouped_matmul``, one expert at a time: any dtype, any width."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ w.t() for part, w in zip(rows.split(counts), weight.unbind(0), strict=True)])


@torch.library.custom_op("blockwright::grouped_matmul", mutates_args=())
def _opaque(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``grouped_matmul`` as one operator, opaque to the compiler."""
    if _grouped_mm_takes(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return grouped_matmul_reference(rows, weight, ends)


@_opaque.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("blockwright::grouped_outer", mutates_args=())
def _opaque_outer(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """grad [M,N], rows [M,K] → [E,N,K], the weight's gradient: each expert's sum of outer products of its rows."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.stack([g.t() @ r for g, r in zip(grad.split(counts), rows.split(counts), strict=True)])


@_opaque_outer.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return _opaque(grad, weight.transpose(1, 2).contiguous(), ends), _opaque_outer(grad, rows, ends), None


_opaque.register_autograd(_backward, setup_context=_keep)


class Choices(NamedTuple):
    """Expert choices of each token.

    experts: [T,k] int64; E means no expert
    weights: [T,k]; 0 where there is no expert, and their gradient is of no use there
    pairs: at most how many entries of ``experts`` are below E; None: T·k
    """

    experts: Tensor
    weights: Tensor
    pairs: int | None = None


def is_grouped(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> bool:
    """Whether torch has a kernel for grouped products: on a GPU for bf16, of compute capability 9 and 10. Elsewhere its
    own way is a loop over experts, for which the host waits (A100: pytorch#186620; consumer cards: #184334)."""
    half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cuda")
    return not x.is_cuda or (half and capability_of(x.device)[0] in (0, 9, 10))


@kernel("experts", "grouped", capability=(9, 0), takes=is_grouped, order=20)
def swiglu_experts(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
    """By grouped products, without synchronising with the device.

    Args:
        x: [T,D]
        choices: of its tokens
        gate_up: [E,2F,D], gate rows first
        down: [E,D,F]

    Returns:
        [T,D]
    """
    order, weights = in_order(choices, len(gate_up))
    gate, up = grouped_matmul(dispatch(x, order), gate_up.to(x.dtype), order.ends).chunk(2, -1)
    hidden = F.silu(gate) * up * weights.to(gate.dtype)[:, None]
    return combine(grouped_matmul(hidden, down.to(x.dtype), order.ends), order)


# The same call by another name, for the cost card: on older GPUs and in other dtypes, torch loops over experts, and the
# host waits for it.
kernel("experts", "loop", order=30)(swiglu_experts)


def in_order(choices: Choices, n_experts: int) -> tuple[Order, Tensor]:
    """The order of (token, choice) pairs by expert, and their weights in it, [M]."""
    order = sort_by_expert(choices.experts, n_experts, choices.pairs)
    return order, choices.weights.flatten().index_select(0, order.sorted)
