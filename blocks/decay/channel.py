from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Placement
from blockwright.blocks.decay.base import LONGEST, SHORTEST, Decay, check_time_steps, draw_rates, draw_time_steps
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("decay", "channel")
class Channel(Decay):
    """A decay for each channel of each head, from a projection of low rank.

    Kimi Delta Attention, arXiv 2510.26692: g = −exp(a_n) · softplus(W_up W_down x + b), or, bounded as in Ling and
    GLM-5.3, g = −most · σ(exp(a_n) · (W_up W_down x + b)). At the start exp(a) is uniform in [1, 16] and
    softplus(b), the time step, log-uniform in [0.001, 0.1]. Neither decays in AdamW.

    Args:
        rank: width of W_down x; null is the head width, as in Kimi-Linear
        most: bound of −g, 5 in Ling: a token leaves at least 0.7 % of a channel; null for none
        least_step: shortest initial time step; the shorter, the longer a channel remembers
        most_step: longest initial time step
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int,
        rank: Count | None = None,
        most: Positive | None = None,
        least_step: Positive = SHORTEST,
        most_step: Positive = LONGEST,
    ) -> None:
        super().__init__()
        check_time_steps(least_step, most_step)
        self.steps = least_step, most_step
        self.head_dim, self.most = head_dim, most
        self.down = Linear(d_model, rank or head_dim, bias=False)
        self.up = Linear(rank or head_dim, n_heads * head_dim, bias=False)
        self.log_rate = nn.Parameter(torch.empty(n_heads))
        self.bias = nn.Parameter(torch.empty(n_heads * head_dim))

    def reset_parameters(self) -> None:
        draw_rates(self.log_rate)
        draw_time_steps(self.bias, *self.steps)

    def forward(self, x: Tensor) -> Tensor:
        rate = at_least_fp32(self.log_rate).exp()[:, None]
        steps = (at_least_fp32(self.up(self.down(x))) + self.bias).unflatten(-1, (-1, self.head_dim))
        return -rate * F.softplus(steps) if self.most is None else -self.most * (rate * steps).sigmoid()

    def parallel_plan(self) -> dict[str, Placement]:
        return {"down.weight": "replicate", "up.weight": "column", "log_rate": "column", "bias": "column"}
