from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Placement
from blockwright.blocks.norm.base import Norm
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("norm", "layernorm")
class LayerNorm(Norm):
    """Layer norm: centre, scale to unit variance, learned gain and shift.

    Ba et al. 2016, arXiv 1607.06450: y = (x − mean) / sqrt(var + eps) · g + b.

    Args:
        eps: added to the variance; 1e-5 in GPT-2
        bias: whether the shift b is learned; published decoders from PaLM on leave it out
    """

    def __init__(self, dim: int, eps: Positive = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": "replicate", **({} if self.bias is None else {"bias": "replicate"})}
