"""The contract of ``balance``: an auxiliary loss that evens out the load of experts. Children of gating, any number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blocks.base import Block
from registry import BlockError, family


def _same(counts: Tensor) -> Tensor:
    return counts


@family("balance", context=("n_experts", "top_k"))
class Balance(Block):
    """Returns weighted losses. Token counts carry no gradient, so it flows through the affinities only.

    A loss with counts of the whole batch passes them through ``mean_over_ranks``, which multi-rank training sets to
    average them; per-sequence losses need not.
    """

    mean_over_ranks: Callable[[Tensor], Tensor] = staticmethod(_same)

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The losses of this routing.

        Args:
            probs: [B,T,E] affinities of B sequences, before any selection bias or group mask
            experts: [B,T,k] the choices made
            logits: [B,T,E] the inputs of the affinities

        Returns:
            name → scalar, already weighted
        """
        raise NotImplementedError


def choices(experts: Tensor, probs: Tensor) -> Tensor:
    """Tokens of each sequence that chose each expert, [B,E] in the dtype of probs.

    Entries equal to E (no expert) are not counted.

    Args:
        experts: [B,T,k], or [T,k] for one sequence
        probs: [...,E]
    """
    flat, E = experts.flatten(-2), probs.shape[-1]
    counts = torch.zeros(*flat.shape[:-1], E + 1, dtype=probs.dtype, device=flat.device)
    return counts.scatter_add_(-1, flat, torch.ones_like(flat, dtype=probs.dtype))[..., :E]


def shares(probs: Tensor) -> Tensor:
    """P: affinities [B,T,E], divided by their sum over experts, averaged over the sequence: [B,E]."""
    return (probs / probs.sum(-1, keepdim=True)).mean(-2)


def check_devices(n_experts: int, n_devices: int) -> None:
    """Refuse a number of devices that does not divide the experts.

    Raises:
        BlockError
    """
    if n_devices < 1 or n_experts % n_devices:
        remedy = "Choose a divisor of the number of experts"
        raise BlockError("n_devices", n_devices, f"must divide n_experts ({n_experts})", remedy)
