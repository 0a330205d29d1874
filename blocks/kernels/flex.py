"""Causal attention by FlexAttention, for cases without a fused scaled-dot-product kernel on a GPU.

Dong et al. 2024, arXiv 2412.05496. Scores may have a bias, a soft cap and sinks; windows and document borders become a
block mask, whose empty blocks are skipped. Not yet run on a GPU by this project: parity is tested in eager mode on a
CPU, where it materialises all scores and is of no other use.

Not supported: gradients of the bias.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels.scoring import Scoring

KEPT = 16  # cached block masks, by shape and window


def flex_causal_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention of the last T of S positions on all previous ones; arguments as in ``causal_attention``.

    A sink is a key without a value: with L the log of the sum of a query's exponentials, all weights are scaled by
    exp(L) / (exp(L) + exp(sink)) = sigmoid(L − sink).
    """
    scale, bias, segments, window, sinks, softcap = scoring
    T, S, V = q.shape[1], k.shape[1], v.shape[-1]
    if q.shape[-1] < V:  # the kernels need values no wider than keys
        q, k = F.pad(q, (0, V - q.shape[-1])), F.pad(k, (0, V - k.shape[-1]))
    y, norm = _flex(q.device)(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=_score_mod(
            bias, None if softcap is None else torch.full((), softcap, dtype=torch.float32, device=q.device)
        ),
        block_mask=_block_mask(T, S, q.device, segments, window),
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
        **_returning_norm(),
    )
    if sinks is not None:
        y = y * torch.sigmoid(norm.lse - sinks.to(norm.lse.dtype)[:, None])[..., None].to(y.dtype)
    return y.transpose(1, 2)


def _returning_norm() -> dict[str, Any]:
    from torch.nn.attention.flex_attention import AuxRequest

    return {"return_aux": AuxRequest(lse=True)}


@functools.lru_cache(maxsize=2)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(device: torch.device) -> Callable[..., Any]:
    """The operator: compiled where it is fused; uncompiled inside another compilation, or where nothing fuses it."""
    from torch.nn.attention.flex_attention import flex_attention

    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _compiled()
    return flex_attention


def _score_mod(bias: Tensor | None, softcap: Tensor | None) -> Callable[..., Tensor] | None:
    """Modification of a score: the cap (a tensor, since each number would be compiled separately), then the bias
    [B|1,N,T,S]."""
    if bias is None and softcap is None:
        return None
    one = bias is not None and bias.shape[0] == 1

    def changed(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[0 if one else b, h, t, s]

    return changed


def _block_mask(T: int, S: int, device: torch.device, segments: Tensor | None, window: int | None) -> Any:
    """The pairs that may see each other; not cached for segments, which differ from batch to batch."""
    if segments is None:
        return _shared_mask(T, S, window, device)
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    def same(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return segments[b, t] == segments[b, s]

    pairs = and_masks(causal(T, S, window), same)
    return create_block_mask(pairs, len(segments), None, T, S, device=device)


@functools.lru_cache(maxsize=KEPT)
def _shared_mask(T: int, S: int, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(causal(T, S, window), None, None, T, S, device=device)


def causal(T: int, S: int, window: int | None) -> Callable[..., Tensor]:
    """mask_mod: query t, at position S − T + t, sees keys up to itself, within the window."""
    past = S - T

    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        mask = s <= t + past
        return mask if window is None else mask & (s > t + past - window)

    return seen
