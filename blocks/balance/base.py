"""The contract of ``balance``: an auxiliary loss that evens out the load of experts. Children of gating, any number."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.over_ranks import OverRanks, sums_of, tokens_of
from blockwright.registry import BlockError, family


@family("balance", context=("n_experts", "top_k"))
class Balance(OverRanks, Block):
    """Returns weighted losses. Token counts carry no gradient, so it flows through the affinities only.

    A batch has padding, which is no token, and a rank may have some of the batch's sequences and some of a sequence's
    tokens. So a loss is made of ``over_sequences``, ``over_batch`` and ``mean``, which count the tokens of all ranks
    and no padding, and are what the losses of the ranks must be for their average to be that of all.

    Class attributes:
        splits: whether a sequence may be spread over ranks; else a training that does so is refused
    """

    splits: ClassVar[bool] = False

    def drawn(self) -> Drawn:
        return Drawn(lines=(), acts="training")

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        """The losses of this routing.

        Args:
            probs: [B,T,E] affinities of B sequences, before any selection bias or group mask
            experts: [B,T,k] the choices made; E for padding
            logits: [B,T,E] the inputs of the affinities
            real: [B,T], which are tokens and not padding; None for all

        Returns:
            name → scalar, already weighted
        """
        raise NotImplementedError

    def over_sequences(self, counts: Tensor, values: Tensor, real: Tensor | None) -> Tensor:
        """Σ_i (counts of a sequence)_i / its tokens · (mean of values over its tokens)_i, averaged over the sequences.

        Args:
            counts: [B,n], of the tokens of each sequence
            values: [B,T,n]
            real: [B,T], as in ``forward``
        """
        n_tokens = tokens_of(values, real)
        counts, n_tokens = self.sequence_ranks.sum(torch.cat((counts, n_tokens), 1)).split((counts.shape[1], 1), 1)
        means = sums_of(values, real) * self.sequence_ranks.number / n_tokens.clamp(min=1)
        each = (counts / n_tokens.clamp(min=1) * means).sum(-1)  # 0 for a sequence of padding
        return each.sum() / (n_tokens > 0).sum().clamp(min=1)


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
    """Affinities [...,E], divided by their sum over experts."""
    return probs / probs.sum(-1, keepdim=True)


def check_devices(n_experts: int, n_devices: int) -> None:
    """Refuse a number of devices that does not divide the experts.

    Raises:
        BlockError
    """
    if n_devices < 1 or n_experts % n_devices:
        remedy = "Choose a divisor of the number of experts"
        raise BlockError("n_devices", n_devices, f"must divide n_experts ({n_experts})", remedy)
