"""Causal attention by FlexAttention, for what scaled-dot-product attention has no fused path for on a GPU.

Dong et al. 2024, arXiv 2412.05496. Scores may be shifted by a bias, squeezed by a soft cap and joined by sinks; windows
and the borders of documents become a block mask, whose empty blocks are never computed. Not run on a GPU by this
project so far: its parity is tested in eager mode on a CPU, where it holds all scores and serves for nothing else.

Left out: gradients of a bias that does not come from the head and the distance alone (``bias`` is read, not learnt).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels.scoring import Scoring

KEPT = 16  # block masks of shapes and windows that are remembered


def flex_causal_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention of the last T of S positions on all that came before them; arguments as in ``causal_attention``.

    A sink is a key that stands for nothing: with L the log of the sum of a query's exponentials, all weights shrink by
    exp(L) / (exp(L) + exp(sink)) = sigmoid(L − sink).
    """
    scale, bias, segments, window, sinks, softcap = scoring
    T, S, V = q.shape[1], k.shape[1], v.shape[-1]
    if q.shape[-1] < V:  # the kernels want values no wider than keys
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
    """The operator: compiled where it is fused; as it is where a compiler is at work already, or nothing fuses it."""
    from torch.nn.attention.flex_attention import flex_attention

    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _compiled()
    return flex_attention


def _score_mod(bias: Tensor | None, softcap: Tensor | None) -> Callable[..., Tensor] | None:
    """What is done to the score of one pair: the cap (a tensor: numbers would each be compiled for), then the bias
    [B|1,N,T,S]."""
    if bias is None and softcap is None:
        return None
    one = bias is not None and bias.shape[0] == 1

    def changed(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[0 if one else b, h, t, s]

    return changed


def _block_mask(T: int, S: int, device: torch.device, segments: Tensor | None, window: int | None) -> Any:
    """The pairs that may see each other; made anew for segments, which differ from batch to batch."""
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
    """mask_mod: query t, which stands at S − T + t, sees keys up to itself, and no further back than the window."""
    past = S - T

    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        mask = s <= t + past
        return mask if window is None else mask & (s > t + past - window)

    return seen
