from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Placement
from blockwright.blocks.decay.base import LONGEST, SHORTEST, Decay, check_time_steps, draw_rates, draw_time_steps
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("decay", "head")
class Head(Decay):
    """One decay for each head.

    Yang et al. 2024 (Gated DeltaNet), arXiv 2412.06464, from Mamba-2: g_n = −exp(a_n) · softplus(w_n · x + b_n). At the
    start exp(a) is uniform in [0.01, 16] and softplus(b), the time step, log-uniform in [0.001, 0.1], as in
    flash-linear-attention and OLMo-Hybrid; Qwen3-Next starts with b = 1. Neither decays in AdamW.

    Args:
        least_step: shortest initial time step; the shorter, the longer a state remembers
        most_step: longest initial time step
    """

    def __init__(
        self, d_model: int, n_heads: int, least_step: Positive = SHORTEST, most_step: Positive = LONGEST
    ) -> None:
        super().__init__()
        check_time_steps(least_step, most_step)
        self.steps = least_step, most_step
        self.project = Linear(d_model, n_heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(n_heads))
        self.bias = nn.Parameter(torch.empty(n_heads))

    def reset_parameters(self) -> None:
        draw_rates(self.log_rate, 0.01)
        draw_time_steps(self.bias, *self.steps)

    def forward(self, x: Tensor) -> Tensor:
        steps = F.softplus(at_least_fp32(self.project(x)) + self.bias)
        return -(at_least_fp32(self.log_rate).exp() * steps)[..., None]

    def parallel_plan(self) -> dict[str, Placement]:
        return {"project.weight": "column", "log_rate": "column", "bias": "column"}
