"""Means over an optimizer step: every micro-batch, on every rank.

A term of the loss is a sum (nats of tokens, losses of sequences) with a count to divide it by. Micro-batches and ranks
may have unequal counts, so each must be divided by the count of the whole step, which is known before the first
backward pass because the step's batches are counted ahead. Then the gradient is that of one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blockwright.training.parallel.ranks import DataRanks

Counts = Mapping[str, Tensor]


class StepMean:
    """The counts of the current optimizer step, and means over it."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._scale = self._together = 1
        self._figures: dict[str, Tensor] = {}

    @property
    def begun(self) -> bool:
        """Whether the current step has been counted."""
        return bool(self._totals)

    def begin(self, counts: Sequence[Counts], micro_batches: int, ranks: DataRanks, device: torch.device) -> None:
        """Add up the counts of a step's micro-batches, on all ranks.

        Args:
            counts: name → count, or sum of weights, of each micro-batch
            micro_batches: their nominal number in a step
            ranks: that compute different tokens
            device: to add them up on
        """
        names = list(counts[0])
        own = torch.stack([torch.stack([each[name] for name in names]).to(device) for each in counts]).sum(0)
        totals = ranks.sum(own)
        self._totals = dict(zip(names, totals.float().unbind(), strict=True))
        # Lightning divides by the nominal number of micro-batches per step, strategies by the number of ranks.
        self._scale = micro_batches * ranks.number
        self._together = ranks.together  # all of which have counted the same windows

    def end(self) -> None:
        """Reset; the next batch begins another step."""
        self._totals, self._figures = {}, {}

    def mean(self, total: Tensor, name: str) -> Tensor:
        """A micro-batch's part of a mean over the step.

        Args:
            total: sum over this rank's tokens of the micro-batch, with its gradient
            name: of the count to divide by

        Returns:
            a part that, averaged over ranks and divided by ``accumulate_grad_batches``, sums to the mean; 0 where the
            step has none, so that the loss of what is not there has no gradient
        """
        return total * (self._scale * self._together) / self._divisor(name)

    def figure(self, total: Tensor, name: str) -> Tensor:
        """As ``mean``, of what is only logged: NaN where the step has none, of which 0 would be an opinion."""
        return self.mean(total, name).masked_fill(self._totals[name] == 0, torch.nan)

    def _divisor(self, name: str) -> Tensor:
        total = self._totals[name]
        return total.masked_fill(total == 0, 1)

    def share(self, part: int | Tensor, name: str) -> Tensor:
        """The factor from a micro-batch's mean over ``part`` to its part of the step's mean: 1 if all are equal."""
        return part * self._scale / self._divisor(name)

    def record(self, figures: Mapping[str, Tensor], micro_batches: int) -> None:
        """Add a micro-batch's parts of means, for ``figures``."""
        for name, value in figures.items():
            self._figures[name] = self._figures.get(name, 0) + value.detach() / micro_batches

    def figures(self, ranks: DataRanks) -> dict[str, Tensor]:
        """The recorded means over the step and all ranks; must be called on all ranks."""
        return {name: ranks.mean(value) for name, value in self._figures.items()}
