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


class ByChannel(Decay):
    """A decay for each channel of each head: the shared base of ``channel`` and ``full_rank``.

    A subclass has ``project``, x [B,T,D] → [B,T,N·K].
    """

    def __init__(self, n_heads: int, head_dim: int, most: float | None, least_step: float, most_step: float) -> None:
        super().__init__()
        check_time_steps(least_step, most_step)
        self.steps = least_step, most_step
        self.head_dim, self.most = head_dim, most
        self.log_rate = nn.Parameter(torch.empty(n_heads))
        self.bias = nn.Parameter(torch.empty(n_heads * head_dim))

    def project(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        draw_rates(self.log_rate)
        draw_time_steps(self.bias, *self.steps)

    def forward(self, x: Tensor) -> Tensor:
        rate = at_least_fp32(self.log_rate).exp()[:, None]
        steps = (at_least_fp32(self.project(x)) + self.bias).unflatten(-1, (-1, self.head_dim))
        return -rate * F.softplus(steps) if self.most is None else -self.most * (rate * steps).sigmoid()

    def parallel_plan(self) -> dict[str, Placement]:
        return {"log_rate": "column", "bias": "column"}


@register("decay", "channel")
class Channel(ByChannel):
    """A decay for each channel of each head, from a projection of low rank.

    Kimi Delta Attention, arXiv 2510.26692: g = −exp(a_n) · softplus(W_up W_down x + b), or, bounded as in Kimi K3 and
    GLM-5.3, g = −most · σ(exp(a_n) · (W_up W_down x + b)). At the start exp(a) is uniform in [1, 16] and
    softplus(b), the time step, log-uniform in [0.001, 0.1]. Neither decays in AdamW.

    Args:
        rank: width of W_down x; null is the head width, as in Kimi-Linear
        most: bound of −g, 5 in Kimi K3: a token leaves at least 0.7 % of a channel; null for none
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
        super().__init__(n_heads, head_dim, most, least_step, most_step)
        self.down = Linear(d_model, rank or head_dim, bias=False)
        self.up = Linear(rank or head_dim, n_heads * head_dim, bias=False)

    def project(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def parallel_plan(self) -> dict[str, Placement]:
        return {**super().parallel_plan(), "down.weight": "replicate", "up.weight": "column"}
