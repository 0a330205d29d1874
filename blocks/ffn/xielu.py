from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Placement
from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.registry import register
from blockwright.registry.ranges import Count

BETA, EPS = 0.5, -1e-6  # slope at 0; the least distance from 0 of what expm1 sees


@register("ffn", "xielu")
class XIELU(FFN):
    """Two-layer feed-forward network with xIELU, whose two curvatures are learned.

    Huang & Schlag 2024, arXiv 2411.13010; Apertus, arXiv 2509.14233: y = W_down xielu(W_up x) with xielu(u) =
    α_p u² + u/2 for u > 0, else α_n (e^u − 1 − u) + u/2; α_p = softplus(p), α_n = 1/2 + softplus(n), both 0.8 at the
    start. No biases. As in Apertus, e^u − 1 is taken at min(u, −1e-6).

    Args:
        d_ff: F, hidden width; null is 4 d_model
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(self, d_model: int, d_ff: Count | None = None) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff or 4 * d_model, bias=False)
        self.down = Linear(d_ff or 4 * d_model, d_model, bias=False)
        self.positive, self.negative = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        self.positive.fill_(math.log(math.expm1(0.8)))
        self.negative.fill_(math.log(math.expm1(0.8 - BETA)))

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        u = self.up(x)
        above = F.softplus(self.positive) * u.square()
        below = (BETA + F.softplus(self.negative)) * (u.clamp(max=EPS).expm1() - u)
        return self.down(torch.where(u > 0, above, below) + BETA * u), None

    def parallel_plan(self) -> dict[str, Placement]:
        curves: dict[str, Placement] = {"positive": "replicate", "negative": "replicate"}
        return {"up.weight": "column", "down.weight": "row", **curves}
