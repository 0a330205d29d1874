"""Attention to latents and a part that all heads share, by the matrices of ``Scored.up``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blockwright.blocks.attention.remembered import Layout
from blockwright.blocks.kernels import latent_attention
from blockwright.blocks.kernels.latent_attention import into_latents, of_latents
from blockwright.blocks.kernels.scoring import Bias, of_heads


def widths(q: Tensor, up: Tensor, shape: Layout) -> tuple[int, int, int, int]:
    """The widths C, R, n, V of ``Scored.up``."""
    _, (R,) = next(iter(shape.shapes.values()))
    n = q.shape[-1] - R
    return up.shape[2], R, n, up.shape[1] - n


def queries_of_latents(q: Tensor, up: Tensor, shape: Layout) -> tuple[Tensor, Tensor]:
    """Queries [B,T,N,n+R] → [B,T,N,C+R], and the value matrices of the heads, [N,V,C]."""
    _, R, n, _ = widths(q, up, shape)
    own, rest = q.split((n, R), -1)
    return torch.cat((into_latents(own, up[:, :n]), rest), -1), up[:, n:]


def bytes_of_a_head(q: Tensor, up: Tensor, parts: Sequence[Tensor]) -> int:
    """Of its keys and values, expanded from latents [B,S,C]."""
    latent, R = parts[0], parts[1].shape[-1]
    n = q.shape[-1] - R
    V = up.shape[1] - n
    return latent[..., 0].numel() * (n + R + V) * latent.element_size()


def by_heads(
    attend: Callable[[Tensor, Tensor, Tensor, Bias], Tensor],
    q: Tensor,
    parts: Sequence[Tensor],
    up: Tensor,
    bias: Bias,
) -> Tensor:
    """Attention of some heads at a time, [B,T,N,V], whose keys and values are expanded again for the gradient.

    Args:
        attend: queries, keys, values and bias of some heads → [B,T,·,V]
        parts: latents [B,S,C] and the shared part [B,S,R]
        up: [N,n+V,C]
    """
    latent, shared = parts
    n = q.shape[-1] - shared.shape[-1]
    V = up.shape[1] - n

    def some(up: Tensor, q: Tensor, bias: Bias) -> Tensor:
        return attend(q, *of_latents(F.linear(latent, up.flatten(0, 1)), shared, n, V), bias)

    together = latent_attention.heads_together(q.shape[2], bytes_of_a_head(q, up, parts))
    heads = [slice(first, first + together) for first in range(0, q.shape[2], together)]
    given = [(up[h], q[:, :, h], None if bias is None else of_heads(bias, h)) for h in heads]
    return torch.cat([checkpoint(some, *each, use_reentrant=False, preserve_rng_state=False) for each in given], 2)
