"""The contract of ``balance``: an auxiliary loss that evens out the load of experts. Children of gating, any number."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from blocks.base import Block
from registry import BlockError, family


def _alone(counts: Tensor, n_tokens: int) -> Tensor:
    return counts / n_tokens


@family("balance", context=("n_experts", "top_k"))
class Balance(Block):
    """Returns weighted losses. Token counts carry no gradient, so it flows through the affinities only.

    A rank may have some of the batch's sequences, and some of a sequence's tokens. So counts become counts per token by
    ``over_batch`` or ``over_sequence``, which multi-rank training sets to count the tokens of all its ranks; the rest
    must be a mean over tokens, since the losses of the ranks are averaged.

    Class attributes:
        splits: whether a sequence may be spread over ranks; else a training that does so is refused

    Attributes:
        over_batch: (counts of this rank's tokens, their number) → counts per token of the batch
        over_sequence: the same per token of each sequence, for counts [B,…] and tokens of a sequence
    """

    splits: ClassVar[bool] = False
    over_batch: Callable[[Tensor, int], Tensor] = staticmethod(_alone)
    over_sequence: Callable[[Tensor, int], Tensor] = staticmethod(_alone)

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
