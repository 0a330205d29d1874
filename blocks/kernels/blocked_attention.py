"""Causal attention of whole sequences on a CPU, a block of queries at a time against the keys that it may see.

Dao et al. 2022 (FlashAttention), arXiv 2205.14135, with whole rows in place of an online softmax: the scores of some
hundred queries fit the cache. What torch's flash kernel for CPUs does not do, this does: it leaves out blocks above the
diagonal, outside a window and of other documents at every length; keys and values may differ in width (MLA); products
go through the matrix library. It loses where sequences are so short that the loop over blocks costs more, and where
one block's scores outgrow the cache: ``suits`` knows.

In low precision, scores are rounded to that precision before the softmax, which is computed in fp32, as in eager
implementations; torch's flash kernel keeps them in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocks.kernels.scoring import Scoring

SHORTEST, LONGEST = 128, 4096  # tokens
QUERIES = {torch.bfloat16: 256}  # in a block; low precision has less to fetch for each product
DEFAULT_QUERIES = 128
KEPT = 512  # tokens of a sequence whose weights are kept for the way back, less than the rest of a layer keeps


class _Block(NamedTuple):
    """Queries ``rows`` of one sequence see keys ``start`` … the last of ``rows``."""

    sequence: int
    rows: slice
    keys: slice
    hidden: Tensor | None  # [rows,keys], True where a key is not to be seen; None: only those after the query


def suits(q: Tensor, k: Tensor, scoring: Scoring) -> bool:
    """Whether this can be done here, and is the faster way: whole sequences of middling length, on a CPU."""
    T, can = q.shape[1], scoring.sinks is None and scoring.softcap is None and not scoring.learns_bias
    return can and q.device.type == "cpu" and k.shape[1] == T and SHORTEST <= T <= LONGEST


def _blocks(q: Tensor, segments: Tensor | None, window: int | None) -> list[_Block]:
    B, T = q.shape[:2]
    size = QUERIES.get(q.dtype, DEFAULT_QUERIES)
    positions = torch.arange(T)
    found: list[_Block] = []
    for sequence in range(B):
        for begin in range(0, T, size):
            end, start, hidden = min(begin + size, T), 0, None
            if window is not None:
                start = max(0, begin - window + 1)
            if segments is not None:  # from the first token of any document that these queries are of
                ids = segments[sequence]
                start = max(start, int(torch.isin(ids[:end], ids[begin:end]).int().argmax()))
            if window is not None or segments is not None:
                rows, keys = positions[begin:end, None], positions[start:end]
                hidden = keys > rows
                hidden = hidden if window is None else hidden | (keys <= rows - window)
                hidden = hidden if segments is None else hidden | (ids[begin:end, None] != ids[start:end])
            found.append(_Block(sequence, slice(begin, end), slice(start, end), hidden))
    return found


def _weights(q: Tensor, k: Tensor, block: _Block, bias: Tensor | None, later: Tensor) -> Tensor:
    """Scaled queries [N,q,H] on keys [N,k,H] → weights [N,q,k].

    ``later`` [Q,Q] is added to the scores of a block on itself: 0, and -inf where a key comes after the query.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    if bias is not None:
        scores += bias[block.sequence % len(bias), :, block.rows, block.keys]
    if block.hidden is not None:
        scores.masked_fill_(block.hidden, float("-inf"))
    else:
        n = q.shape[1]
        scores[:, :, -n:] += later[:n, :n]
    return scores.softmax(-1)


def _later(q: Tensor) -> Tensor:
    size = QUERIES.get(q.dtype, DEFAULT_QUERIES)
    return q.new_full((size, size), float("-inf")).triu_(1)


class _BlockedAttention(torch.autograd.Function):
    """On [B,N,T,·]: heads first, so that what a block fetches lies together."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, blocks: list[_Block]
    ) -> Tensor:
        q, (k, v) = q.transpose(1, 2).contiguous().mul(scale), (t.transpose(1, 2).contiguous() for t in (k, v))
        y = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        later, kept = _later(q), []
        for block in blocks:
            b, rows, keys = block.sequence, block.rows, block.keys
            weights = _weights(q[b, :, rows], k[b, :, keys], block, bias, later)
            y[b, rows] = torch.bmm(weights, v[b, :, keys]).transpose(0, 1)
            if q.shape[2] <= KEPT and any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(q, k, v, bias, *kept)
        ctx.scale, ctx.blocks = scale, blocks
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, bias, *kept = ctx.saved_tensors
        grad = grad.transpose(1, 2).contiguous()
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        later = _later(q)
        for index, block in enumerate(ctx.blocks):
            b, rows, keys = block.sequence, block.rows, block.keys
            # Of a part of a tensor a product makes a copy: here one for all of them.
            queries, back, read = (t.contiguous() for t in (q[b, :, rows], grad[b, :, rows], k[b, :, keys]))
            weights = kept[index] if kept else _weights(queries, read, block, bias, later)
            to_v[b, :, keys] += torch.bmm(weights.transpose(1, 2), back)
            to_weights = torch.bmm(back, v[b, :, keys].contiguous().transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_q[b, :, rows] = torch.bmm(to_scores, read)
            to_k[b, :, keys] += torch.bmm(to_scores.transpose(1, 2), queries)
        to_q, to_k, to_v = (t.transpose(1, 2) for t in (to_q.mul_(ctx.scale), to_k, to_v))
        return to_q, to_k, to_v, None, None, None


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """``causal_attention`` of whole sequences; the bias gets no gradient, and there are no sinks and no cap."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    bias = None if scoring.bias is None else scoring.bias.detach().to(q.dtype)
    blocks = _blocks(q, scoring.segments, scoring.window)
    return _BlockedAttention.apply(q, k, v, bias, scoring.scale, blocks)
