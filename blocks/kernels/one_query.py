"""Attention of one query a row to all keys of a cache on a CPU, as in decoding, where reading the keys dominates.

Two batched products and a softmax. torch's fused kernel computes the same in tiles of keys, by whichever library
multiplies larger matrices fastest; where that is oneDNN it reads at half the speed that MKL reaches (16 and 30 GB/s of
some 38 on two Zen 5 cores, at 2,048 to 16,384 keys of one and of eight rows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.kernels.few_rows import by_mkl, is_plain
from blockwright.blocks.kernels.scoring import Scoring, dense


def suits(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether there is one query a row, which sees every key, and the tokens of a head lie side by side in memory."""
    if q.shape[1] != 1 or scoring.segments is not None or scoring.sinks is not None or scoring.softcap is not None:
        return False
    sees_all = scoring.window is None or scoring.window >= k.shape[1]
    return sees_all and _side_by_side(k) and _side_by_side(v) and is_plain(q)


def _side_by_side(t: Tensor) -> bool:
    """Whether [B,S,K,H] is a view of heads first, [B·K,S,H]."""
    B, _, K, H = t.shape
    return t.stride(3) == 1 and t.stride(1) == H and (B == 1 or t.stride(0) == K * t.stride(2))


def one_query(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """``causal_attention`` of q [B,1,N,H]."""
    B, _, N, _ = q.shape
    K, bias = k.shape[2], dense(scoring.bias)
    keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
    with by_mkl():
        scores = torch.bmm((q * scoring.scale).view(B * K, N // K, -1), keys.transpose(1, 2))
        if bias is not None:
            scores.view(B, N, 1, -1).add_(bias)
        return torch.bmm(scores.softmax(-1), values).view(B, 1, N, -1)
