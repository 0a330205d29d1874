"""The contract of ``balance``: an auxiliary loss that evens out the load of experts. A child of gating."""

from __future__ import annotations

from torch import Tensor

from blocks.base import Block
from registry import family


@family("balance", context=("n_experts", "top_k"))
class Balance(Block):
    """Reports weighted losses; counts of tokens carry no gradient, so it flows through the affinities alone."""

    def forward(self, probs: Tensor, experts: Tensor) -> dict[str, Tensor]:
        """Affinities probs [B,T,E] and choices experts [B,T,k], B sequences → name → scalar, already weighted."""
        raise NotImplementedError
