"""Attention of a few queries a row to all keys of a cache on a CPU, as in decoding, where reading the keys dominates.

Two batched products and a softmax. torch's fused kernel computes the same in tiles of keys, by whichever library
multiplies larger matrices fastest; where that is oneDNN it reads at half the speed that MKL reaches (16 and 30 GB/s of
some 38 on two Zen 5 cores, at 2,048 to 16,384 keys of one and of eight rows). Several queries are a token and drafts of
those after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.kernels.products import by_mkl, is_plain
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.kernels.seam import kernel

FEW = 8  # queries a row


def suits(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
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


@kernel("attention", "few_queries", devices=("cpu",), takes=suits, order=11)
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
