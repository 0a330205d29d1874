"""Attention of all positions on all, as in encoders: fast implementations and a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.seam import kernel


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
