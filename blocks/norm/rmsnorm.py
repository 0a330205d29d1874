from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Placement
from blockwright.blocks.norm.base import Norm
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("norm", "rmsnorm")
class RMSNorm(Norm):
    """Root-mean-square norm with a learned gain, no centring.

    Zhang & Sennrich 2019, arXiv 1910.07467: y = x / sqrt(mean(x²) + eps) · g.

    In low precision the mean is taken in fp32 and the gain applied before rounding back, as torch and DeepSeek's
    inference code do; transformers' Llama rounds first, a difference of one unit in the last place of bf16.

    Args:
        eps: added to the mean square; 1e-6 in DeepSeek, 1e-5 in Llama-2
    """

    def __init__(self, dim: int, eps: Positive = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.normalise(x, self.weight, self.eps)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": "replicate"}
