"""Causal attention on a CPU, one block of queries at a time against the keys it may see.

Dao et al. 2022 (FlashAttention), arXiv 2205.14135, with whole rows instead of an online softmax: the scores of some
hundred queries fit the cache; short sequences are batched, as small products have overhead. Unlike torch's flash
kernel for CPUs it skips blocks above the diagonal, outside a window and of other documents at every length; keys and
values may differ in width (MLA); products use the matrix library. It is slower for sequences so short that the loop
over blocks dominates, and where a block's scores exceed the cache: see ``suits``. Where torch's kernel would need a
mask of T × S for long sequences (packed documents, a window, queries at the end of more keys), it takes some heads at a
time, so that memory grows with S alone.

In low precision, scores are rounded to that precision before the softmax, which is computed in fp32, as in eager
implementations; torch's flash kernel keeps them in fp32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.kernels.long_attention import LONGEST, SHORTEST
from blockwright.blocks.kernels.products import multiplies_by_onednn
from blockwright.blocks.kernels.scoring import Bias, Scoring, dense, part
from blockwright.blocks.kernels.seam import as_written, kernel

# Tokens of a whole sequence from which blocks win where oneDNN multiplies: torch's own attention for CPUs calls it for
# each tile of at most 32 keys. Forward and backward of 64 tokens, 48 × 4 heads of 16 on a Zen 4 core, take 2.7 ms by a
# block and 24 by tiles (fp32), 2.1 and 15 (bf16); by MKL, 3.4 and 3.3.
SHORTEST_BY_ONEDNN = 32
# Tokens of a whole sequence in fp32 up to which blocks win; in low precision they do at every length. On two Zen 5
# cores, heads of 64, torch's time for a block's: at 512 tokens 1.2 and with the gradient 1.6, at 1,024 .83 and .96, at
# 4,096 .77 and .79; in bf16 2.2 and 1.8 at 4,096, 2.1 and 1.7 at 16,384.
LONGEST_WHOLE = 1024
SCORES = 2**22  # bytes of a block's scores, the limit of batching sequences
MOST = 2**25  # bytes of a block's scores beyond LONGEST, or of one head's
KEPT = 512  # longest sequence whose weights are kept for the backward pass, less memory than the rest of a layer


class _Block(NamedTuple):
    """Queries ``rows`` of adjacent sequences, which see keys from ``start`` to the last of ``rows``."""

    sequences: slice
    own: slice  # heads of each of them
    heads: slice  # the same among those of all sequences
    rows: slice
    keys: slice
    hidden: Tensor | None  # [rows,keys], True for masked keys; None: causal only


def suits(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether this implementation works and is faster here: on a CPU, and no long sequence in fp32 without a mask."""
    T, S = q.shape[1], k.shape[1]
    can = scoring.sinks is None and scoring.softcap is None and not scoring.learns_bias
    short = T == S and as_written() and multiplies_by_onednn(q.dtype)  # a compiler cannot ask which library it is
    shortest = SHORTEST_BY_ONEDNN if short else SHORTEST
    longest = LONGEST_WHOLE if torch.is_grad_enabled() else LONGEST_WHOLE - 1
    wins = longest >= S or q.element_size() < 4 or not scoring.plain or T < S
    return can and q.device.type == "cpu" and shortest <= T and wins


def _blocks(q: Tensor, S: int, segments: Tensor | None, window: int | None) -> list[_Block]:
    B, T, N = q.shape[:3]
    size, past = _queries(S), S - T
    scores = size * S * q.element_size()  # bytes of one head's
    at_once = N if S <= LONGEST else min(N, max(1, MOST // scores))
    together = max(1, SCORES // (N * scores)) if segments is None and at_once == N else 1
    positions = torch.arange(S)
    found: list[_Block] = []
    for sequence in range(0, B, together):
        behind = min(B, sequence + together)
        for begin in range(past, S, size):
            end, start, hidden = min(begin + size, S), 0, None
            if window is not None:
                start = max(0, begin - window + 1)
            if segments is not None:  # from the first token of any of these queries' documents
                ids = segments[sequence]
                start = max(start, int(torch.isin(ids[:end], ids[begin:end]).int().argmax()))
            if window is not None or segments is not None:
                rows, keys = positions[begin:end, None], positions[start:end]
                hidden = keys > rows
                hidden = hidden if window is None else hidden | (keys <= rows - window)
                hidden = hidden if segments is None else hidden | (ids[begin:end, None] != ids[start:end])
            for head in range(0, N, at_once):
                own = slice(head, min(head + at_once, N))
                heads = slice(sequence * N + own.start, (behind - 1) * N + own.stop)
                place = slice(begin - past, end - past), slice(start, end)
                found.append(_Block(slice(sequence, behind), own, heads, *place, hidden))
    return found


def _weights(q: Tensor, k: Tensor, block: _Block, bias: Bias, later: Tensor, out: Tensor | None = None) -> Tensor:
    """Scaled queries [b·N,q,H] on keys [b·N,k,H] of b sequences → weights [b·N,q,k].

    ``later`` [Q,Q] is added to a block's scores on itself: 0, and -inf where a key comes after the query.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    added = part(bias, block.sequences, block.own, block.rows, block.keys)
    if added is not None:
        by_sequence = scores.unflatten(0, (block.sequences.stop - block.sequences.start, -1))
        by_sequence += added.to(scores.dtype)
    if block.hidden is not None:
        scores.masked_fill_(block.hidden, float("-inf"))
    else:
        n = q.shape[1]
        scores[:, :, -n:] += later[:n, :n]
    return torch.softmax(scores, -1, out=out)


def _queries(S: int) -> int:
    """Queries per block: fewer for short sequences, since part of the last keys is computed in vain."""
    return 128 if S <= 1024 else 256


def _later(q: Tensor, k: Tensor) -> Tensor:
    size = _queries(k.shape[1])
    return q.new_full((size, size), float("-inf")).triu_(1)


def _parts(kept: Tensor, blocks: list[_Block]) -> list[Tensor | None]:
    """The blocks' weights as views of one buffer, or None for each if it is empty."""
    if not len(kept):
        return [None] * len(blocks)
    found: list[Tensor | None] = []
    start = 0
    for block in blocks:
        shape = [part.stop - part.start for part in (block.heads, block.rows, block.keys)]
        found.append(kept[start : start + math.prod(shape)].view(shape))
        start += math.prod(shape)
    return found


def _room(q: Tensor, S: int) -> int:
    """Upper bound of the number of weights of all blocks, for q [B,T,N,·] on S keys; 0 if they are not kept."""
    B, T, N = q.shape[:3]
    size = _queries(S)
    return B * N * sum((min(S, b + size) - b) * min(S, b + size) for b in range(S - T, S, size)) if S <= KEPT else 0


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Bias, blocks: list[_Block], n_heads: int, kept: Tensor) -> Tensor:
    """Scaled queries, keys and values, heads first → [B,T,N,V]; stores weights in ``kept``, if it has room."""
    y = q.new_empty(len(q) // n_heads, q.shape[1], n_heads, v.shape[-1])
    later = _later(q, k)
    for block, out in zip(blocks, _parts(kept, blocks), strict=True):
        sequences, own, heads, rows, keys, _ = block
        weights = _weights(q[heads, rows], k[heads, keys], block, bias, later, out)
        by_sequence = torch.bmm(weights, v[heads, keys]).unflatten(0, (sequences.stop - sequences.start, -1))
        y[sequences, rows, own] = by_sequence.transpose(1, 2)
    return y


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Bias,
    blocks: list[_Block],
    scale: float,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of unscaled queries, keys and values, from that of the result, all heads first."""
    to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    later = _later(q, k)
    for block, weights in zip(blocks, _parts(kept, blocks), strict=True):
        _, _, heads, rows, keys, _ = block
        # A product copies a non-contiguous operand: one copy here for all of them.
        queries, back, read = (t.contiguous() for t in (q[heads, rows], grad[heads, rows], k[heads, keys]))
        weights = _weights(queries, read, block, bias, later) if weights is None else weights
        to_v[heads, keys] += torch.bmm(weights.transpose(1, 2), back)
        to_weights = torch.bmm(back, v[heads, keys].contiguous().transpose(1, 2))
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        to_q[heads, rows] = torch.bmm(to_scores, read)
        to_k[heads, keys] += torch.bmm(to_scores.transpose(1, 2), queries)
    return to_q.mul_(scale), to_k, to_v


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Bias, scale: float, blocks: list[_Block]) -> Tensor:
        N, kept = q.shape[2], q.new_empty(_room(q, k.shape[1]) if any(ctx.needs_input_grad) else 0)
        q, k, v = heads_first(q).mul_(scale), heads_first(k), heads_first(v)
        ctx.save_for_backward(q, k, v, kept)
        ctx.scale, ctx.blocks, ctx.bias = scale, blocks, bias
        return _forward(q, k, v, bias, blocks, N, kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, kept = ctx.saved_tensors
        found = _backward(heads_first(grad), q, k, v, ctx.bias, ctx.blocks, ctx.scale, kept)
        to_q, to_k, to_v = (heads_last(t, grad.shape[2]) for t in found)
        return to_q, to_k, to_v, None, None, None


@torch.library.custom_op("blockwright::blocked_attention", mutates_args=())
def _opaque(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segments: Tensor | None,
    window: int | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The result and the kept weights, as one operator, opaque to the compiler."""
    kept = q.new_empty(_room(q, k.shape[1]) if keep else 0)
    first = heads_first(q).mul_(scale), heads_first(k), heads_first(v)
    return _forward(*first, bias, _blocks(q, k.shape[1], segments, window), q.shape[2], kept), kept


@_opaque.register_fake
def _(q, k, v, bias, segments, window, scale, keep):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(_room(q, k.shape[1]) if keep else 0)


@torch.library.custom_op("blockwright::blocked_attention_backward", mutates_args=())
def _opaque_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segments: Tensor | None,
    kept: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    first = heads_first(grad), heads_first(q).mul_(scale), heads_first(k), heads_first(v)
    found = _backward(*first, bias, _blocks(q, k.shape[1], segments, window), scale, kept)
    to_q, to_k, to_v = (heads_last(t, grad.shape[2]).contiguous() for t in found)
    return to_q, to_k, to_v


@_opaque_backward.register_fake
def _(grad, q, k, v, bias, segments, kept, window, scale):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _opaque_grads(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_opaque_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale), *[None] * 5


_opaque.register_autograd(_opaque_grads, setup_context=_keep)


def heads_first(t: Tensor) -> Tensor:
    """[B,T,N,·] → [B·N,T,·], a copy."""
    return t.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def heads_last(t: Tensor, n_heads: int) -> Tensor:
    """[B·N,T,·] → [B,T,N,·], a view."""
    return t.unflatten(0, (-1, n_heads)).transpose(1, 2)


@kernel("attention", "blocked", devices=("cpu",), takes=suits, order=10)
def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """``causal_attention`` without sinks or cap, and without a gradient of the bias."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    if torch.compiler.is_compiling():
        bias = dense(scoring.bias)
        bias = None if bias is None else bias.detach().to(q.dtype)
        return _opaque(q, k, v, bias, scoring.segments, scoring.window, scoring.scale, torch.is_grad_enabled())[0]
    blocks = _blocks(q, k.shape[1], scoring.segments, scoring.window)
    return _BlockedAttention.apply(q, k, v, scoring.bias, scoring.scale, blocks)
