"""SwiGLU experts in one pass over each expert's tokens: the fast path of a CPU.

The tokens of an expert, or of several small adjacent experts, are gathered, multiplied, activated, weighted and
multiplied again before the next ones; only the two halves of the hidden layer are kept for the backward pass, which
gathers the tokens again. Weight gradients are written in place into the stack's: slicing a stack under autograd would
make a gradient of the whole stack for every expert. The router's weight multiplies the hidden vector, the narrow side.

Experts of one group are padded to the longest of them, for one batched product: for an expert with a few dozen tokens,
launching a separate product costs more than computing it. A padding row repeats a row of its expert with weight 0. So
a CPU computes more than a cost card announces: at most by ``WASTE`` of the experts' products, ``WASTE_OF_THIN`` of few.

For a few tokens, as in decoding, there is neither a sort nor a grouped product, only the chosen experts' matrices: time
goes into reading weights and launching operators, and unchosen experts cost nothing.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.grouped_matmul import Choices, Order, in_order
from blockwright.blocks.kernels.products import linear, multiplies_by_onednn
from blockwright.blocks.kernels.seam import kernel

FEW = 64  # pairs; with more, most experts are chosen and a Python loop costs more than the sort


def few(experts: Tensor) -> bool:
    """Whether choices [T,k] are few, and nothing (gradients, a compiler, another device) requires the general path."""
    usual = torch.is_grad_enabled() or torch.compiler.is_compiling() or experts.device.type != "cpu"
    return not usual and experts.numel() <= FEW


def few_swiglu(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Σ over a token's choices of w · W_down,e (silu(W_gate,e x) ⊙ W_up,e x).

    Args:
        x: [T,D]
        experts: [T,k]; E means no expert
        weights: [T,k]
        gate_up: [E,2F,D], gate rows first
        down: [E,D,F]

    Returns:
        [T,D]
    """
    flat, k = experts.flatten().tolist(), experts.shape[1]
    pairs = sorted((e, i) for i, e in enumerate(flat) if e < len(gate_up))
    if not pairs:
        return torch.zeros_like(x)
    visited = [(e, len(list(group))) for e, group in groupby(pairs, key=lambda pair: pair[0])]
    chosen, token = torch.tensor([[i, i // k] for _, i in pairs], dtype=torch.int64).unbind(1)
    gate, up = _by_expert(x.index_select(0, token), gate_up, visited).chunk(2, -1)
    hidden = F.silu(gate).mul_(up).mul_(weights.flatten().index_select(0, chosen)[:, None])
    answers = _by_expert(hidden, down, visited).to(x.dtype)  # autocast returns its own dtype
    return torch.zeros_like(x).index_add_(0, token, answers)


def _by_expert(rows: Tensor, weight: Tensor, visited: list[tuple[int, int]]) -> Tensor:
    """Rows sorted by expert through their experts' matrices: [M,K], [E,N,K] → [M,N]."""
    parts = rows.split([n for _, n in visited])
    return torch.cat([linear(part, weight[e].to(rows.dtype)) for part, (e, _) in zip(parts, visited, strict=True)])


ROWS = 8192  # per pass: fewer would fit the L2 cache, but thin products cost more than that saves
WASTE = 1.3  # maximum ratio of padded to real rows in a group
SHORT = 448  # rows of an expert above which a separate product pays off
THIN, WASTE_OF_THIN = 32, 1.6  # with so few rows, reading the matrices dominates
_SILU, _SILU_BACKWARD = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


class _Group(NamedTuple):
    """Adjacent experts of equal, padded length; or a part of one long expert, ``first`` if it is the first part.

    rows: slice of all padded rows
    """

    experts: slice
    rows: slice
    length: int
    first: bool


def _groups(counts: list[int], rounded: bool) -> list[_Group]:
    found: list[_Group] = []
    start, expert = 0, 0

    def add(experts: slice, length: int, first: bool = True) -> None:
        nonlocal start
        total = length * (experts.stop - experts.start)
        found.append(_Group(experts, slice(start, start + total), length, first))
        start += total

    while expert < len(counts):
        if counts[expert] > ROWS:
            parts = -(-counts[expert] // ROWS)
            for part in range(parts):
                add(slice(expert, expert + 1), _length(-(-counts[expert] // parts), rounded), part == 0)
            expert += 1
            continue
        end, longest, total = expert + 1, counts[expert], counts[expert]
        while end < len(counts) and longest <= SHORT:
            length, together = max(longest, counts[end]), total + counts[end]
            padded = (end + 1 - expert) * _length(length, rounded)
            if padded > ROWS or padded > (WASTE_OF_THIN if length <= THIN else WASTE) * together:
                break
            end, longest, total = end + 1, length, together
        add(slice(expert, end), _length(longest, rounded))
        expert = end
    return found


def _length(rows: int, rounded: bool) -> int:
    """Round up to one of few lengths: oneDNN compiles a kernel for every new shape, taking 1 ms and half a MiB."""
    multiple = 1 if not rounded else 8 if rows < 512 else 32 if rows < 2048 else 128
    return max(1, -(-rows // multiple) * multiple)


class _Padded(NamedTuple):
    """Rows with padding; P has few possible sizes, so unused rows may follow the last group.

    groups: in order
    source: [P] sorted position of the pair in each row; repeated for padding
    tokens: [P] its token
    real: [P] whether the row is not padding
    place: [M] row of each sorted position
    """

    groups: list[_Group]
    source: Tensor
    tokens: Tensor
    real: Tensor
    place: Tensor


def _pad(order: Order, rounded: bool) -> _Padded:
    ends = order.ends.long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    groups = _groups(counts.tolist(), rounded)
    lengths = [0] * len(counts)  # rows of each expert, with padding
    for group in groups:
        for expert in range(group.experts.start, group.experts.stop):
            lengths[expert] += group.length
    if not len(order.sorted):  # no pair has an expert
        nothing = order.sorted
        return _Padded([], nothing, nothing, nothing.bool(), nothing)
    padded = torch.tensor(lengths, dtype=torch.int64)
    starts = ends - counts
    owner = torch.arange(len(lengths)).repeat_interleave(padded)
    owner = F.pad(owner, (0, _room(len(owner)) - len(owner)), value=len(lengths) - 1)
    inside = torch.arange(len(owner)) - (padded.cumsum(0) - padded)[owner]
    real = inside < counts[owner]
    last = max(0, len(order.sorted) - 1)
    source = (starts[owner] + torch.minimum(inside, (counts[owner] - 1).clamp(min=0))).clamp(max=last)
    return _Padded(groups, source, order.sorted[source] // order.k, real, real.nonzero()[:, 0])


def _spread(weights: Tensor, padded: _Padded) -> Tensor:
    """Weights of pairs in sorted order → [P,1], of each row; 0 for padding."""
    return (weights[padded.source] * padded.real)[:, None]


def _room(rows: int) -> int:
    """Round up to one of few sizes, by at most a sixteenth.

    Routing and lengths change at every step: ever new tensor sizes would fragment memory, which keeps growing, by pages
    that the system must zero first.
    """
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


class _Scratch:
    """Buffers reused by one group after the other."""

    def __init__(self, like: Tensor, groups: list[_Group]) -> None:
        longest = max((g.rows.stop - g.rows.start for g in groups), default=1)
        self.like, self.rows = like, 1 << (longest - 1).bit_length()
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        """[rows,width] from the buffer with that name."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.rows, width)
        return self.buffers[name][:rows]


def _forward(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order, padded: _Padded, room: int
) -> tuple[Tensor, Tensor]:
    """The tokens' sums [T,D], and the two halves of the hidden layer, [room,2F], for the backward pass."""
    tokens, F_ = padded.tokens, down.shape[2]
    spread = _spread(weights, padded)
    halves, rows = x.new_empty(room, 2 * F_), x.new_empty(len(tokens), x.shape[1])
    scratch = _Scratch(x, padded.groups)
    for experts, part, length, _ in padded.groups:
        n = part.stop - part.start
        inputs = torch.index_select(x, 0, tokens[part], out=scratch("inputs", n, x.shape[1]))
        torch.bmm(_each(inputs, length), gate_up[experts].transpose(1, 2), out=_each(halves[part], length))
        gate, up = halves[part].split(F_, 1)
        hidden = _SILU(gate, out=scratch("hidden", n, F_)).mul_(up).mul_(spread[part])
        torch.bmm(_each(hidden, length), down[experts].transpose(1, 2), out=_each(rows[part], length))
    return _sum_choices(rows, order, padded), halves


def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    halves: Tensor,
    order: Order,
    padded: _Padded,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weights, gate_up and down."""
    tokens, (D, F_) = padded.tokens, down.shape[1:]
    spread = _spread(weights, padded)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    rows, grad_weights = x.new_empty(len(tokens), D), spread.new_empty(len(tokens))
    scratch = _Scratch(x, padded.groups)
    for experts, part, length, first in padded.groups:
        n = part.stop - part.start
        inputs = torch.index_select(x, 0, tokens[part], out=scratch("inputs", n, D))
        grads = torch.index_select(grad, 0, tokens[part], out=scratch("grads", n, D))
        gate, up = halves[part].split(F_, 1)
        both = scratch("both", n, 2 * F_)
        to_gate, to_up = both.split(F_, 1)
        silu, back = _SILU(gate, out=scratch("silu", n, F_)), scratch("back", n, F_)
        torch.bmm(_each(grads, length), down[experts], out=_each(back, length))
        hidden = torch.mul(silu, up, out=scratch("hidden", n, F_))
        torch.sum(torch.mul(back, hidden, out=to_gate), 1, out=grad_weights[part])
        _outer(_each(grads, length), _each(hidden.mul_(spread[part]), length), grad_down[experts], first)
        back.mul_(spread[part])
        torch.mul(back, silu, out=to_up)
        _SILU_BACKWARD(back.mul_(up), gate, grad_input=to_gate)
        _outer(_each(both, length), _each(inputs, length), grad_gate_up[experts], first)
        torch.bmm(_each(both, length), gate_up[experts], out=_each(rows[part], length))
    if not padded.groups:
        grad_gate_up.zero_()
        grad_down.zero_()
    return _sum_choices(rows, order, padded), grad_weights[padded.place], grad_gate_up, grad_down


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
        padded = _pad(order, multiplies_by_onednn(x.dtype))
        y, halves = _forward(x, weights, gate_up, down, order, padded, len(padded.tokens))
        ctx.save_for_backward(x, weights, gate_up, down, halves)
        ctx.order, ctx.padded = order, padded
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        x, weights, gate_up, down, halves = saved
        return *_backward(grad, x, weights, gate_up, down, halves, ctx.order, ctx.padded), None


@torch.library.custom_op("blockwright::grouped_swiglu", mutates_args=())
def _opaque(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    places: Tensor,
    place: Tensor | None,
    ends: Tensor,
    n_tokens: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    """``_forward`` as one operator, opaque to the compiler: its loop depends on the routing."""
    order = Order(places, place, ends, n_tokens, k)
    padded = _pad(order, multiplies_by_onednn(x.dtype))
    return _forward(x, weights, gate_up, down, order, padded, _most_rows(places, ends))


@_opaque.register_fake
def _(x, weights, gate_up, down, places, place, ends, n_tokens, k):  # type: ignore[no-untyped-def]
    return x.new_empty(n_tokens, x.shape[1]), x.new_empty(_most_rows(places, ends), gate_up.shape[1])


@torch.library.custom_op("blockwright::grouped_swiglu_backward", mutates_args=())
def _opaque_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    halves: Tensor,
    places: Tensor,
    place: Tensor | None,
    ends: Tensor,
    n_tokens: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = Order(places, place, ends, n_tokens, k)
    return _backward(grad, x, weights, gate_up, down, halves, order, _pad(order, multiplies_by_onednn(x.dtype)))


@_opaque_backward.register_fake
def _(grad, x, weights, gate_up, down, halves, places, place, ends, n_tokens, k):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, weights, gate_up, down))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.n_tokens, ctx.k = inputs
    ctx.save_for_backward(*tensors, output[1])


def _opaque_grads(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weights, gate_up, down, places, place, ends, halves = ctx.saved_tensors
    given = (grad, x, weights, gate_up, down, halves, places, place, ends, ctx.n_tokens, ctx.k)
    return *_opaque_backward(*given), *[None] * 5


_opaque.register_autograd(_opaque_grads, setup_context=_keep)


def _most_rows(places: Tensor, ends: Tensor) -> int:
    """Upper bound of the rows with padding: allocated where the routing is unknown, without being written."""
    return 2 * places.shape[0] + 8 * ends.shape[0]


def _each(rows: Tensor, length: int) -> Tensor:
    """Rows of a group by expert: [e·length,·] → [e,length,·]."""
    return rows.view(-1, length, rows.shape[1])


def _outer(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    """out = leftᵀ · right for the first rows of an expert, added for further ones."""
    if first:
        torch.bmm(left.transpose(1, 2), right, out=out)
    else:
        out.baddbmm_(left.transpose(1, 2), right)


def _sum_choices(rows: Tensor, order: Order, padded: _Padded) -> Tensor:
    """Padded rows [P,D] → [T,D]."""
    if order.place is None:
        pairs = rows.index_select(0, padded.place)
        return rows.new_zeros(order.n_tokens, rows.shape[1]).index_add_(0, order.sorted // order.k, pairs)
    place = padded.place[order.place]
    if order.k == 1:
        return rows.index_select(0, place)
    return F.embedding_bag(place.view(-1, order.k), rows, mode="sum")


def grouped_swiglu(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
    """Σ over a token's experts of weight · W_down,e (silu(W_gate,e x) ⊙ W_up,e x).

    Args:
        x: [T,D]
        weights: [M] of each (token, choice) pair, in sorted order
        gate_up: [E,2F,D], gate rows first
        down: [E,D,F]
        order: of the pairs, from ``sort_by_expert``

    Returns:
        [T,D]
    """
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = (t.to(low) if t.dtype == torch.float32 else t for t in (x, gate_up, down))
    weights = weights.to(x.dtype)
    if torch.compiler.is_compiling():
        return _opaque(x, weights, gate_up, down, order.sorted, order.place, order.ends, order.n_tokens, order.k)[0]
    return _GroupedSwiGLU.apply(x, weights, gate_up, down, order)


@kernel("experts", "segments", devices=("cpu", "cuda"), automatic=("cpu",), order=10)
def swiglu_experts_on_cpu(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
    """For few pairs, one expert at a time; else in one pass over the sorted tokens.

    Args:
        x: [T,D]
        choices: of its tokens
        gate_up: [E,2F,D], gate rows first
        down: [E,D,F]

    Returns:
        [T,D]
    """
    if few(choices.experts):
        return few_swiglu(x, choices.experts, choices.weights, gate_up, down)
    order, weights = in_order(choices, len(gate_up))
    return grouped_swiglu(x, weights, gate_up.to(x.dtype), down.to(x.dtype), order)
