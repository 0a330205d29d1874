from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Placement
from blockwright.blocks.norm.base import Norm
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("norm", "dynamic_tanh")
class DynamicTanh(Norm):
    """A learned tanh in place of a norm: no statistics of the token.

    Zhu et al. 2025 (DyT), arXiv 2503.10622: y = γ ⊙ tanh(α x) + β, one α, at the start γ = 1, β = 0.

    Args:
        alpha: α at the start; the paper takes 0.2 to 1, less for wider models
    """

    def __init__(self, dim: int, alpha: Positive = 0.5) -> None:
        super().__init__()
        self.start = alpha
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        self.alpha.fill_(self.start)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, torch.tanh(self.alpha * x))

    def parallel_plan(self) -> dict[str, Placement]:
        return {"alpha": "replicate", "weight": "replicate", "bias": "replicate"}
