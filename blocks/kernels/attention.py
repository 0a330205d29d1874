"""Scaled-dot-product attention, causal and of all on all: torch's kernels and references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.kernels.seam import kernel


@kernel("attention", "sdpa", order=20)
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention of the last T of S positions on all previous ones.

    Args:
        q: [B,T,N,H]
        k: [B,S,K,H], S ≥ T; N is a multiple of K, and each KV head serves N/K adjacent query heads
        v: [B,S,K,V]
        scoring: computation of the scores

    Returns:
        [B,T,N,V]
    """
    scale, _, segments, window, sinks, softcap = scoring
    if softcap is not None:  # not supported by torch's fused kernels
        return causal_attention_reference(q, k, v, scoring)
    T, S, V, bias = q.shape[1], k.shape[1], v.shape[-1], dense(scoring.bias)
    # Flash kernels need equal widths: zero columns change neither scores nor, once removed, the result. A cost, which
    # is measured on the meta device, has none: kernels that take unequal widths make no products with them.
    if q.shape[-1] > V and not q.is_meta:
        v = F.pad(v, (0, q.shape[-1] - V))
    elif q.shape[-1] < V and not q.is_meta:
        q, k = F.pad(q, (0, V - q.shape[-1])), F.pad(k, (0, V - k.shape[-1]))
    window = None if window is None or window >= S else window
    plain = scoring._replace(window=window).plain
    mask: Any = None
    if T == 1 and bias is not None and segments is None and window is None and sinks is None:
        mask, bias = bias.to(q.dtype), None  # one query sees every key
    elif not plain or 1 < T < S:
        mask = _lower_right(T, S) if plain and q.is_cuda else visible(T, S, q.device, segments, window)
    if bias is not None:
        mask = bias.to(q.dtype).masked_fill(~mask, float("-inf"))
    if sinks is not None and not q.is_meta:  # one more key and value, of zeros, whose score is the sink
        k, v, mask = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1)), _with_sinks(mask, sinks, q)
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


def cudnn_takes(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether cuDNN takes keys wider than values (MLA) as they are, by torch's own account; else values are padded."""
    if not scoring.plain or q.shape[-1] <= v.shape[-1] or q.shape[1] != k.shape[1] or torch.compiler.is_compiling():
        return False
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.backends.cuda.can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, k.shape[1] != q.shape[1]))


@kernel("attention", "cudnn", devices=("cuda",), capability=(9, 0), takes=cudnn_takes, order=15)
def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """The same by cuDNN, of whole sequences, with values that are not padded. Not run by this project so far."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = k.shape[1] != q.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scoring.scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _lower_right(T: int, S: int) -> Any:
    """The mask of the last T of S positions as torch's fused kernels know it, with no tensor of T × S."""
    from torch.nn.attention.bias import causal_lower_right  # brings the compiler along, which takes seconds

    return causal_lower_right(T, S)


def _with_sinks(mask: Tensor | None, sinks: Tensor, q: Tensor) -> Tensor:
    """Additive scores [B|1,N,T,S+1] with the sinks as last column."""
    assert mask is not None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    B, _, T, S = mask.shape
    N = q.shape[2]
    column = sinks.to(q.dtype)[None, :, None, None].expand(B, N, T, 1)
    return torch.cat((mask.expand(B, N, T, S), column), -1)


def visible(T: int, S: int, device: torch.device, segments: Tensor | None = None, window: int | None = None) -> Tensor:
    """Which keys each query may see: [1,1,T,S] or, with segments [B,S], [B,1,T,S] booleans."""
    queries, keys = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
    mask = (keys <= queries)[None, None]
    if window is not None:
        mask = mask & (keys > queries - window)
    if segments is not None:
        mask = mask & (segments[:, None, S - T :, None] == segments[:, None, None, :])
    return mask


@kernel("attention", "reference", automatic=False, order=30)
def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """The definition: scores, mask, softmax, average; one KV head copied for each query head."""
    scale, _, segments, window, sinks, softcap = scoring
    bias = dense(scoring.bias)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], q.device, segments, window), float("-inf"))
    if sinks is not None:
        B, N, T, _ = scores.shape
        scores = torch.cat((scores, sinks.to(scores.dtype)[None, :, None, None].expand(B, N, T, 1)), -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("bnts,bsnv->btnv", weights[..., : v.shape[1]], v)


# --- attention of all positions on all, as in encoders: fast implementations and a reference ---


@kernel("encoder_attention", "sdpa", order=20)
def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v without a mask.

    Args:
        q, k, v: [B,T,N,H]
        scale: multiplies q·k

    Returns:
        [B,T,N,H]
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@kernel("encoder_attention", "reference", automatic=False, order=30)
def encoder_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition."""
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("bnts,bsnv->btnv", weights, v)
