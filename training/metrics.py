"""Metrics of a language model and its experts, summed exactly over batches and ranks.

Sums are fp64 whatever the precision of training, and kept on the CPU if the device has no fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from blockwright.training.figure import Figure

WITHOUT_FP64 = ("mps",)  # types of devices
LOADS = ("train_load", "val_load", "test_load")  # groups of logged figures


class Sums(Metric):
    """A metric whose states are fp64 sums: casting the module moves them without rounding."""

    full_state_update = False

    def add_sum(self, name: str, shape: Sequence[int] = (), persistent: bool = False) -> None:
        """Add a state that starts at zero and is summed over ranks; stored in checkpoints if ``persistent``."""
        self.add_state(name, torch.zeros(tuple(shape), dtype=torch.float64), "sum", persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Sums:
        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, dtype=torch.float32, device=tensor.device)).device
            return tensor if device.type in WITHOUT_FP64 else tensor.to(device)

        super()._apply(move, exclude_state)
        return self

    def _wide(self, value: Tensor) -> Tensor:
        """A value converted for adding to the sums: detached, in their dtype and on their device."""
        state = getattr(self, next(iter(self._defaults)))
        return value.detach().to(state.device).to(state.dtype)  # in two steps: the value's device may have no fp64


class TokenLoss(Sums):
    """Mean loss per token, perplexity and bits per byte over everything added.

    Sums are kept, not means of means: batches of different length count by their tokens.

    Args:
        persistent: whether checkpoints store the sums, for a metric that is in use when they are written
        only_finite: leave out batches with a non-finite loss, such as those of skipped steps
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, persistent: bool = False, only_finite: bool = False) -> None:
        super().__init__()
        self.only_finite = only_finite
        for name in ("nats", "tokens", "bytes"):
            self.add_sum(name, persistent=persistent)

    def update(self, nll: Tensor, tokens: Tensor, n_bytes: Tensor) -> None:
        """Add the summed negative log-likelihood in nats of scored tokens, their number, and their bytes of text."""
        nll, tokens, n_bytes = (self._wide(value) for value in (nll, tokens, n_bytes))
        counts = nll.isfinite() if self.only_finite else torch.ones_like(nll, dtype=torch.bool)
        self.nats += torch.where(counts, nll, 0)
        self.tokens += tokens * counts
        self.bytes += n_bytes * counts

    def compute(self) -> dict[str, Tensor]:
        loss = self.nats / self.tokens
        figures = {"loss": loss, "perplexity": loss.exp()}
        if self.bytes:  # else the batches are no text
            figures["bits_per_byte"] = self.nats / self.bytes / math.log(2)
        return figures


class Accuracy(Sums):
    """The share of predictions that are right, over everything added."""

    figures: ClassVar[tuple[Figure, ...]] = (Figure("accuracy", "of the scored tokens", "more"),)
    right: Tensor
    of: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "of"):
            self.add_sum(name)

    def update(self, right: Tensor) -> None:
        """Add predictions: whether each is right, [n]."""
        self.right += self._wide(right.sum())
        self.of += right.numel()

    def compute(self) -> Tensor:
        return self.right / self.of


class ExpertLoad(Sums):
    """Load balance of one layer's experts.

    max_violation: load of the busiest expert over the mean load, minus 1 (0 is even; Wang et al. 2024, MaxVio)
    entropy: of the shares, divided by ln E (1 is even)
    busiest: share of all choices of the busiest expert
    shares: each expert's share of all choices, [E]; not logged

    Args:
        n_experts: E
        persistent: as in ``TokenLoss``
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("layer{layer}/max_violation", "of the mean load", "less", LOADS),
        Figure("layer{layer}/entropy", "of ln E", "more", LOADS),
        Figure("layer{layer}/busiest", "of all choices", "less", LOADS),
    )
    load: Tensor

    def __init__(self, n_experts: int, persistent: bool = False) -> None:
        super().__init__()
        self.add_sum("load", (n_experts,), persistent)

    def update(self, load: Tensor) -> None:
        """Add the number of choices of each expert, [E]."""
        self.load += self._wide(load)

    def compute(self) -> dict[str, Tensor]:
        shares = self.load / self.load.sum().clamp(min=1)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum() / math.log(max(2, len(shares)))
        busiest = shares.max()
        return {"max_violation": busiest * len(shares) - 1, "entropy": entropy, "busiest": busiest, "shares": shares}
