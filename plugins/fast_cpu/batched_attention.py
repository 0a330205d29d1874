"""Attention on a CPU by batched products of whole matrices of scores: of all positions on all, and of few queries.

Encoders of images have many short sequences. torch's flash kernel for CPUs multiplies one small tile after the other,
which costs more than computing it; here one product serves as many heads as have scores that fit the cache. Measured on
two Zen 4 cores, forward and backward: 16 positions 3.5 times as fast in fp32 by MKL, 16 times by oneDNN and 8 times in
bf16; 576 positions 1.0, 1.6 and 2.5 times. The weights are kept for the backward pass: N·T numbers a position, at most
as much as the rest of a layer of that many positions, where torch's kernel computes them again.

In low precision, scores are rounded to that precision before the softmax, which is computed in fp32, as in eager
implementations; torch's flash kernel keeps them in fp32.

A few queries a row, a token and drafts of those after it, attend to all keys of a cache in decoding, where reading the
keys dominates. torch's fused kernel computes the same in tiles of keys, by whichever library multiplies larger matrices
fastest; where that is oneDNN it reads at half the speed that MKL reaches (16 and 30 GB/s of some 38 on two Zen 5 cores,
at 2,048 to 16,384 keys of one and of eight rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.kernels.products import by_mkl, is_plain
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.kernels.seam import as_written, kernel
from blockwright.plugins.fast_cpu.blocked_attention import heads_first, heads_last

LONGEST = 1024  # positions; beyond, weights outgrow the rest of a layer
SCORES = 2**22  # bytes of the scores of heads computed together


def _parts(q: Tensor) -> Iterator[slice]:
    """Heads [B·N,T,H] that are computed together, a multiple of the threads."""
    threads, a_head = torch.get_num_threads(), q.shape[1] ** 2 * q.element_size()
    together = max(1, SCORES // (threads * a_head)) * threads
    return (slice(start, start + together) for start in range(0, len(q), together))


class _BatchedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        N, (q, k, v) = q.shape[2], (heads_first(t) for t in (q, k, v))
        q.mul_(scale)
        kept = q.new_empty(len(q), q.shape[1], q.shape[1]) if any(ctx.needs_input_grad) else None
        y = torch.empty_like(v)
        for part in _parts(q):
            scores = torch.bmm(q[part], k[part].transpose(1, 2), out=None if kept is None else kept[part])
            torch.bmm(torch.softmax(scores, -1, out=scores), v[part], out=y[part])
        ctx.save_for_backward(q, k, v, kept)
        ctx.scale = scale
        return heads_last(y, N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, kept = ctx.saved_tensors
        N, grad = grad.shape[2], heads_first(grad)
        to_q, to_k, to_v = (torch.empty_like(t) for t in (q, k, v))
        for part in _parts(q):
            torch.bmm(kept[part].transpose(1, 2), grad[part], out=to_v[part])
            to_weights = torch.bmm(grad[part], v[part].transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, kept[part], -1, kept.dtype)
            torch.bmm(to_scores, k[part], out=to_q[part])
            torch.bmm(to_scores.transpose(1, 2), q[part], out=to_k[part])
        to_q, to_k, to_v = (heads_last(t, N) for t in (to_q.mul_(ctx.scale), to_k, to_v))
        return to_q, to_k, to_v, None


def suits(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether sequences are short enough, and neither a compiler nor autocast, which casts products, is at work."""
    casts = q.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    return q.shape[1] <= LONGEST and as_written() and not casts


@kernel("encoder_attention", "batched", devices=("cpu",), takes=suits, order=10)
def batched_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``encoder_attention`` without a second derivative."""
    return _BatchedAttention.apply(q, k, v, scale)


FEW = 8  # queries a row


def suits_few(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether the queries are few, each sees every key up to its own, and the tokens of a head lie side by side in
    memory."""
    T, S = q.shape[1], k.shape[1]
    if T > FEW or scoring.segments is not None or scoring.sinks is not None or scoring.softcap is not None:
        return False
    sees_all = scoring.window is None or scoring.window >= S
    return sees_all and _side_by_side(k) and _side_by_side(v) and is_plain(q)


def _side_by_side(t: Tensor) -> bool:
    """Whether [B,S,K,H] is a view of heads first, [B·K,S,H]."""
    B, _, K, H = t.shape
    return t.stride(3) == 1 and t.stride(1) == H and (B == 1 or t.stride(0) == K * t.stride(2))


@kernel("attention", "few_queries", devices=("cpu",), takes=suits_few, order=12)
def few_queries(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """``causal_attention`` of q [B,T,N,H], of a few T."""
    B, T, N, _ = q.shape
    K, S, bias = k.shape[2], k.shape[1], dense(scoring.bias)
    keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
    queries = (q * scoring.scale).transpose(1, 2).reshape(B * K, N // K * T, -1)
    with by_mkl():
        scores = torch.bmm(queries, keys.transpose(1, 2))
        by_head = scores.view(B, N, T, S)
        if bias is not None:
            by_head.add_(bias)
        if T > 1:
            later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu_(1)
            by_head[..., S - T :].masked_fill_(later, float("-inf"))
        return torch.bmm(scores.softmax(-1), values).view(B, N, T, -1).transpose(1, 2)
