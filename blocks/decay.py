"""The contract of ``decay``: how fast a recurrent mixer forgets, by token. A child of attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block, Drawn, Placement
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, Positive

SHORTEST, LONGEST = 1e-3, 0.1  # initial time steps


@family("decay", context=("n_heads", "head_dim"))
class Decay(Block):
    """Context: ``n_heads`` states, each of ``head_dim`` channels, the width of its keys."""

    def drawn(self) -> Drawn:
        return Drawn(acts="state")

    def forward(self, x: Tensor) -> Tensor:
        """The mixer's input x [B,T,D] → logarithm of what remains of the state, at most 0: fp32 [B,T,N,1], the same for
        all channels of a head, or [B,T,N,K]."""
        raise NotImplementedError


def draw_time_steps(bias: Tensor, least: float = SHORTEST, most: float = LONGEST) -> None:
    """Fill ``bias`` so that softplus(bias) is log-uniform in [least, most] (Mamba, arXiv 2312.00752)."""
    steps = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(least), math.log(most)).exp_()
    bias.copy_(steps + (-(-steps).expm1()).log())


def check_time_steps(least: float, most: float) -> None:
    """Refuse a range of initial time steps that is none."""
    if least > most:
        raise BlockError("least_step", least, f"must be at most most_step ({most:g})", "Swap them")


def draw_rates(log_rate: Tensor, least: float = 1.0) -> None:
    """Fill ``log_rate`` with logarithms of numbers uniform in [least, 16]."""
    log_rate.copy_(torch.empty_like(log_rate, dtype=torch.float32).uniform_(least, 16.0).log_())


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


def check_by_head(name: str, decay: Decay) -> None:
    """Refuse a decay by channel where a mixer computes with one number a head."""
    if isinstance(decay, ByChannel):
        raise BlockError(name, "by channel", "must be one number a head", f"Use {name}: head")


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
        return {**super().parallel_plan(), "up.weight": "column"}


@register("decay", "full_rank")
class FullRank(ByChannel):
    """``channel`` with one matrix instead of a projection of low rank.

    Ling 3.0: g = −most · σ(exp(a_n) · (W x + b)), W of N·K rows; without ``most``, −exp(a_n) · softplus(W x + b).

    Args:
        most: bound of −g, 5 in Ling: a token leaves at least 0.7 % of a channel; null for none
        least_step: shortest initial time step; the shorter, the longer a channel remembers
        most_step: longest initial time step
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int,
        most: Positive | None = None,
        least_step: Positive = SHORTEST,
        most_step: Positive = LONGEST,
    ) -> None:
        super().__init__(n_heads, head_dim, most, least_step, most_step)
        self.matrix = Linear(d_model, n_heads * head_dim, bias=False)

    def project(self, x: Tensor) -> Tensor:
        return self.matrix(x)

    def parallel_plan(self) -> dict[str, Placement]:
        return {**super().parallel_plan(), "matrix.weight": "column"}


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
