"""The losses of several validation loaders, each by itself, and their mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blockwright.training.metrics import TokenLoss

MEANS = ("loss", "bits_per_byte")  # figures of which the mean over the loaders is one too


class BySource:
    """Losses of validation loaders by their names.

    The mean is that of the loaders' own means, by weights that do not depend on how long each of them is.
    """

    def __init__(self) -> None:
        self._weights: Mapping[str, float] = {}
        self._losses: list[TokenLoss] = []

    def begin(self, weights: Mapping[str, float], device: torch.device) -> None:
        """Begin a validation.

        Args:
            weights: name of each loader, in order → its weight in the mean; empty if there is one without a name
            device: of the sums
        """
        self._weights, self._losses = weights, [TokenLoss().to(device) for _ in weights]

    def add(self, loader: int, nll: Tensor, tokens: Tensor, n_bytes: Tensor) -> None:
        """Add a batch of a loader, as of ``TokenLoss.update``."""
        if self._losses:
            self._losses[loader].update(nll, tokens, n_bytes)

    def figures(self) -> dict[str, Tensor]:
        """``<name>/loss`` and ``<name>/bits_per_byte`` of each, their means and the perplexity; must be called on all
        ranks."""
        found: dict[str, Tensor] = {}
        for name, loss in zip(self._weights, self._losses, strict=True):
            found |= {f"{name}/{key}": value for key, value in loss.compute().items() if key in MEANS}
        for key in MEANS:
            each = [(weight, found.get(f"{name}/{key}")) for name, weight in self._weights.items() if weight]
            if each and all(value is not None for _, value in each):
                zero = torch.zeros((), dtype=torch.float64)
                found[key] = sum((value * weight for weight, value in each if value is not None), zero)
        return found | ({"perplexity": found["loss"].exp()} if "loss" in found else {})
