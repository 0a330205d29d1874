"""Means over all that an optimizer step is taken on: every micro-batch, on every rank.

A term of the loss is a sum (nats of tokens, losses of sequences) and the count that it is divided by. Micro-batches
and ranks may hold unequal counts, so each has to be divided by the count of the whole step, which is known before the
first backward pass since the step's batches are counted ahead. Then the gradient is that of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from training.lookahead import micro_batches_to_come
from training.parallel.ranks import DataRanks

Counts = Mapping[str, Tensor]


class StepMean:
    """The counts of the optimizer step in progress, and the means that they make.

    Args:
        count: batch → name → how many there are of it, integer tensors on the batch's device, whatever that is
    """

    def __init__(self, count: Callable[[Any], Counts]) -> None:
        self.count = count
        self._totals: dict[str, Tensor] = {}
        self._scale = 1
        self._figures: dict[str, Tensor] = {}

    def begin(self, trainer: L.Trainer, batch: Any, ranks: DataRanks, device: torch.device) -> None:
        """Count the step that a batch belongs to, if it is the step's first."""
        if self._totals:
            return
        counts = [self.count(each) for each in (batch, *micro_batches_to_come(trainer))]
        names = list(counts[0])
        own = torch.stack([torch.stack([each[name] for name in names]).to(device) for each in counts]).sum(0)
        totals = ranks.sum(own).clamp(min=1).float()
        self._totals = dict(zip(names, totals.unbind(), strict=True))
        # Lightning divides by the number of micro-batches that a step should have, strategies by that of ranks.
        self._scale = trainer.accumulate_grad_batches * ranks.number

    def end(self) -> None:
        """Forget the step; the next batch begins another."""
        self._totals, self._figures = {}, {}

    def mean(self, total: Tensor, name: str) -> Tensor:
        """A micro-batch's part of a mean over the step.

        Args:
            total: sum over this micro-batch, with its gradient
            name: of the count to divide by

        Returns:
            what, averaged over ranks and divided by ``accumulate_grad_batches``, sums up to the mean
        """
        return total * self._scale / self._totals[name]

    def share(self, part: int, name: str) -> Tensor:
        """The factor that makes a micro-batch's own mean over ``part`` its part of the step's: 1 if all are equal."""
        return part * self._scale / self._totals[name]

    def record(self, figures: Mapping[str, Tensor], micro_batches: int) -> None:
        """Add a micro-batch's parts of means, for ``figures``."""
        for name, value in figures.items():
            self._figures[name] = self._figures.get(name, 0) + value.detach() / micro_batches

    def figures(self, ranks: DataRanks) -> dict[str, Tensor]:
        """The means over the step of what was recorded, over all ranks, which all have to ask."""
        return {name: ranks.mean(value) for name, value in self._figures.items()}
