"""Causal attention to a long cache on a CPU, of which a part at a time is read: memory does not grow with its length.

The softmax is online, over parts of the keys (Milakov & Gimelshein 2018, arXiv 1805.02867), as in FlashAttention (Dao
et al. 2022, arXiv 2205.14135). Keys and values come from a function that is asked for those of some tokens, and may
expand latents or dequantise codes. The reference is ``causal_attention`` on all of them.

Unlike torch's flash kernel for CPUs it needs no mask where queries are the last of more keys, takes values narrower
than keys as they are (MLA), and computes low precision's products in that precision, its softmax in fp32. Without
gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Read = Callable[[slice], tuple[Tensor, ...]]
Bias = Callable[[slice, slice], Tensor | None]

# Tokens. Between them a CPU attends in blocks; beyond, torch's own attention does where it needs no mask (see
# implementation ``blocked``), and this where keys are cached.
SHORTEST, LONGEST = 128, 4096
ROWS = 256  # queries of a block
SCORES = 2**21  # of a block of queries on a part of the keys, all heads'
PARTS = (256, 2048)  # the fewest and the most keys of a part


def suits(T: int, S: int) -> bool:
    """Whether T new tokens, with S in total, are many on a long past, and nothing needs a gradient."""
    return SHORTEST <= T < S > LONGEST and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def attention_in_parts(q: Tensor, n_keys: int, read: Read, scale: float, bias: Bias | None = None) -> Tensor:
    """Attention of the last T of S positions on all previous ones.

    Args:
        q: [B,T,N,H]
        n_keys: S
        read: keys [B,n,K,H] and values [B,n,K,V] of n of the S tokens; N is a multiple of K
        scale: multiplies q·k
        bias: of some of the T queries on some of the S keys, [B|1,N|1,t,n], added to the scaled scores

    Returns:
        [B,T,N,V]
    """
    B, T, N, _ = q.shape
    past, part = n_keys - T, min(max(SCORES // (B * N * min(T, ROWS)), PARTS[0]), PARTS[1])
    queries = (q * scale).transpose(1, 2)
    running: _Running | None = None
    for start in range(0, n_keys, part):
        keys = slice(start, min(start + part, n_keys))
        k, v = (t.transpose(1, 2).contiguous() for t in read(keys))
        running = running or _Running(queries, v)
        for row in range(max(0, start - past) // ROWS * ROWS, T, ROWS):
            rows = slice(row, min(row + ROWS, T))
            seen = slice(start, min(keys.stop, past + rows.stop))  # by the last of these queries
            n = seen.stop - seen.start
            scores = _per_kv_head(queries[:, :, rows], k[:, :, :n].transpose(2, 3)).to(running.total.dtype)
            added = None if bias is None else bias(rows, seen)
            if added is not None:
                scores += added
            if seen.stop > past + row + 1:
                later = torch.ones(scores.shape[2:], dtype=torch.bool).triu_(past + row - start + 1)
                scores.masked_fill_(later, float("-inf"))
            running.add(rows, scores, v[:, :, :n])
    assert running is not None
    return (running.y / running.total).to(q.dtype).transpose(1, 2)


class _Running:
    """Softmax-weighted sums of the values seen so far: of each query the largest score, the sum of weights relative to
    it, and that of weighted values, [B,N,T,·] in fp32 or more."""

    def __init__(self, queries: Tensor, v: Tensor) -> None:
        wide = torch.promote_types(queries.dtype, torch.float32)
        # Finite: a query may see none of the first keys, and −∞ − −∞ is no number.
        self.top = torch.full((*queries.shape[:3], 1), torch.finfo(wide).min, dtype=wide)
        self.total = torch.zeros_like(self.top)
        self.y = torch.zeros(*queries.shape[:3], v.shape[-1], dtype=wide)

    def add(self, rows: slice, scores: Tensor, v: Tensor) -> None:
        """Add values [B,K,n,V] by scores [B,N,t,n] of some queries; the scores are overwritten."""
        top = torch.maximum(self.top[:, :, rows], scores.amax(-1, keepdim=True))
        weights = scores.sub_(top).exp_()
        kept = (self.top[:, :, rows] - top).exp_()
        self.total[:, :, rows] = self.total[:, :, rows] * kept + weights.sum(-1, keepdim=True)
        self.y[:, :, rows] = self.y[:, :, rows] * kept + _per_kv_head(weights.to(v.dtype), v)
        self.top[:, :, rows] = top


def _per_kv_head(rows: Tensor, matrix: Tensor) -> Tensor:
    """[B,N,t,a] times [B,K,a,b] → [B,N,t,b]; each KV head serves N/K adjacent query heads."""
    B, N, t, _ = rows.shape
    K = matrix.shape[1]
    product = torch.bmm(rows.reshape(B * K, N // K * t, -1), matrix.flatten(0, 1))
    return product.view(B, N, t, -1)
