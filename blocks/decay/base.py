"""The contract of ``decay``: how fast a recurrent mixer forgets, by token. A child of attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.registry import BlockError, family

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
