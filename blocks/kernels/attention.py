"""Causal scaled-dot-product attention: the fast path, and the slow one that says what it computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """Attention of the last T of S positions on all that came before them.

    Args:
        q: [B,T,N,H]
        k: [B,S,K,H], S ≥ T; N is a multiple of K, and each KV head serves N/K neighbouring query heads
        v: [B,S,K,V]
        scale: multiplies q·k
        bias: [B|1,N,T,S] added to the scaled scores
        segments: [B,T] document ids, for S = T; tokens of different documents never see each other

    Returns:
        [B,T,N,V]
    """
    T, S, V = q.shape[1], k.shape[1], v.shape[-1]
    # The flash paths want one width: zero columns change neither scores nor, once cut off, the result.
    if q.shape[-1] > V:
        v = F.pad(v, (0, q.shape[-1] - V))
    elif q.shape[-1] < V:
        q, k = F.pad(q, (0, V - q.shape[-1])), F.pad(k, (0, V - k.shape[-1]))
    plain = bias is None and segments is None
    mask = None if plain and (S == T or T == 1) else visible(T, S, q.device, segments)
    if bias is not None:
        mask = bias.to(q.dtype).masked_fill(~mask, float("-inf"))  # type: ignore[operator]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return y.transpose(1, 2)[..., :V]


def visible(T: int, S: int, device: torch.device, segments: Tensor | None = None) -> Tensor:
    """Which key each query may see: [1,1,T,S] or, with segments, [B,1,T,S] booleans."""
    queries = torch.arange(S - T, S, device=device)
    mask = (torch.arange(S, device=device) <= queries[:, None])[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """The same, written as the definition: scores, mask, softmax, average; one KV head copied for each query head."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], q.device, segments), float("-inf"))
    return torch.einsum("bnts,bsnv->btnv", scores.softmax(-1), v)
