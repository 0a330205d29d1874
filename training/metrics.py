"""What is measured of a language model and of its experts, summed exactly over batches and ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean loss per token, perplexity and bits per byte over everything it was given.

    Sums are kept, not means of means: batches of different length count by their tokens.

    Args:
        persistent: whether checkpoints hold the sums, for a metric that is being filled when they are written
        only_finite: leave out batches whose loss is no finite number, such as those of steps that are skipped
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, persistent: bool = False, only_finite: bool = False) -> None:
        super().__init__()
        self.only_finite = only_finite
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=persistent)

    def update(self, nll: Tensor, tokens: Tensor, n_bytes: Tensor) -> None:
        """Summed negative log-likelihood in nats of so many scored tokens, which stand for so many bytes of text."""
        counts = nll.detach().isfinite() if self.only_finite else torch.ones_like(nll, dtype=torch.bool)
        self.nats += torch.where(counts, nll.detach(), 0)
        self.tokens += tokens * counts
        self.bytes += n_bytes * counts

    def compute(self) -> dict[str, Tensor]:
        loss = self.nats / self.tokens
        bits_per_byte = self.nats / self.bytes / math.log(2)
        return {"loss": loss, "perplexity": loss.exp(), "bits_per_byte": bits_per_byte}


class ExpertLoad(Metric):
    """How evenly the experts of one layer are loaded.

    max_violation: load of the busiest expert over the mean load, minus 1 (0 is even; Wang et al. 2024, MaxVio)
    entropy: of the shares, divided by ln E (1 is even)
    busiest: share of all choices that went to the busiest expert

    Args:
        n_experts: E
        persistent: as in ``TokenLoss``
    """

    full_state_update = False
    load: Tensor

    def __init__(self, n_experts: int, persistent: bool = False) -> None:
        super().__init__()
        zeros = torch.zeros(n_experts, dtype=torch.float64)
        self.add_state("load", zeros, dist_reduce_fx="sum", persistent=persistent)

    def update(self, load: Tensor) -> None:
        """Choices that went to each expert, [E]."""
        self.load += load

    def shares(self) -> Tensor:
        """[E], of this rank's choices."""
        return self.load / self.load.sum().clamp(min=1)

    def compute(self) -> dict[str, Tensor]:
        shares = self.load / self.load.sum().clamp(min=1)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum() / math.log(max(2, len(shares)))
        return {"max_violation": shares.max() * len(shares) - 1, "entropy": entropy, "busiest": shares.max()}
