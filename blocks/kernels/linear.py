"""x Wᵀ + b: torch's, or where few rows are multiplied, as in decoding, whatever was measured to read the matrix faster.

Other implementations are registered with ``automatic=False``: on a CPU only measurement or the user chooses one
(blocks/kernels/products.py), for a number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.products import asked_for
from blockwright.blocks.kernels.seam import compute, first_to_take, kernel

kernel("linear", "torch", order=20)(F.linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``; without gradients by the first chosen implementation that takes it.

    Args:
        x: [..., K]
        weight: [N,K]
        bias: [N]

    Returns:
        [..., N]
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if x.is_cpu and (asked := asked_for(x.numel() // (x.shape[-1] or 1))):
        return first_to_take(asked, x, weight, bias).call(x, weight, bias)
    return compute("linear", x, weight, bias)
