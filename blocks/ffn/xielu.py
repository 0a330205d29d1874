from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Placement
from blockwright.blocks.convolution.base import Convolution
from blockwright.blocks.ffn.plain import Plain
from blockwright.registry import register
from blockwright.registry.ranges import Count

BETA, EPS = 0.5, -1e-6  # slope at 0; the least distance from 0 of what expm1 sees


@register("ffn", "xielu")
class XIELU(Plain):
    """Two-layer feed-forward network with xIELU, whose two curvatures are learned.

    Huang & Schlag 2024, arXiv 2411.13010; Apertus, arXiv 2509.14233: y = W_down xielu(W_up x) with xielu(u) =
    α_p u² + u/2 for u > 0, else α_n (e^u − 1 − u) + u/2; α_p = softplus(p), α_n = 1/2 + softplus(n), both 0.8 at the
    start. No biases. As in Apertus, e^u − 1 is taken at min(u, −1e-6).
    """

    def __init__(self, d_model: int, d_ff: Count | None = None, up_conv: Convolution | None = None) -> None:
        super().__init__(d_model, d_ff, up_conv=up_conv)
        self.positive, self.negative = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        self.positive.fill_(math.log(math.expm1(0.8)))
        self.negative.fill_(math.log(math.expm1(0.8 - BETA)))

    def activated(self, u: Tensor) -> Tensor:
        above = F.softplus(self.positive) * u.square()
        below = (BETA + F.softplus(self.negative)) * (u.clamp(max=EPS).expm1() - u)
        return torch.where(u > 0, above, below) + BETA * u

    def parallel_plan(self) -> dict[str, Placement]:
        return {**super().parallel_plan(), "positive": "replicate", "negative": "replicate"}
