"""x Wᵀ + b: torch's, or where few rows are multiplied, as in decoding, whatever reads the matrix fastest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.seam import compute, kernel

kernel("linear", "torch", order=20)(F.linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``; without gradients by the first implementation that takes it.

    Args:
        x: [..., K]
        weight: [N,K]
        bias: [N]

    Returns:
        [..., N]
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return compute("linear", x, weight, bias)
