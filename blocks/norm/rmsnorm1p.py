from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Placement
from blockwright.blocks.norm.base import Norm
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("norm", "rmsnorm1p")
class RMSNorm1p(Norm):
    """Root-mean-square norm whose learned gain is stored as its difference from one.

    Gemma, arXiv 2403.08295: y = x / sqrt(mean(x²) + eps) · (1 + g), g initially 0, so that weight decay pulls the gain
    to 1 and not to 0. In low precision all of it is computed in fp32 and rounded once, as in Gemma.

    Args:
        eps: added to the mean square; 1e-6 in Gemma
    """

    def __init__(self, dim: int, eps: Positive = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        self.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed * (1 + self.weight.to(wide.dtype))).to(x.dtype)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": "replicate"}
