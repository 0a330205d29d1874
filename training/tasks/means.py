"""Sums and means: of a micro-batch, of an optimizer step, of validation sets, of a training."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from blockwright.blocks.gating.base import Routing
from blockwright.training.metrics import TokenLoss
from blockwright.training.parallel.ranks import DataRanks

# --- the result of scoring a micro-batch ---


@dataclass(frozen=True)
class Scored:
    """One scored micro-batch.

    Args:
        total: the objective, a sum over ``count``, with its gradient
        count: number of scored items (tokens, pairs, …): ``total / count`` is the loss
        logged: the sum to log as the loss, if not ``total``
        terms: further terms of the loss, each already a mean of the step (``Task.step.mean``), with its gradient
        figures: parts of ``total`` to log separately, also means of the step; not added to the loss
        routings: of each layer, None where none routes; the base class handles their balance losses and loads
    """

    total: Tensor
    count: Tensor
    logged: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    routings: Sequence[Routing | None] = ()


# --- means over an optimizer step: every micro-batch, on every rank ---


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


# --- what a task counts over its training ---


class Counted:
    """Counts as of the last optimizer step. They are stored in checkpoints, and the only numbers of a task that grow.

    What a micro-batch adds counts when its step ends, before anything can write a checkpoint. So a checkpoint holds the
    counts of its own step, whichever hook writes it.
    """

    def __init__(self) -> None:
        self._until = Counter[str]()  # the last step
        self._since = Counter[str]()

    def add(self, name: str, number: int) -> None:
        """Count something of a training micro-batch."""
        self._since[name] += number

    def end_step(self) -> None:
        self._until += self._since
        self._since.clear()

    def forget_step(self) -> None:
        """Drop what has been added since the last step, which will be computed again."""
        self._since.clear()

    def __getitem__(self, name: str) -> int:
        return self._until[name]

    def state_dict(self) -> dict[str, int]:
        return dict(self._until)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._until = Counter(state)


# --- the losses of several validation loaders, each by itself, and their mean ---


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


# --- read the remaining micro-batches of an optimizer step ahead of time ---


class Lookahead(Iterator[Any]):
    """An iterator whose next items can be inspected without consuming them."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items
        self._held: deque[Any] = deque()

    def __next__(self) -> Any:
        return self._held.popleft() if self._held else next(self.items)

    def ahead(self, number: int) -> list[Any]:
        """The next ``number`` items, or fewer at the end."""
        while len(self._held) < number:
            try:
                self._held.append(next(self.items))
            except StopIteration:
                break
        return list(self._held)[:number]


def micro_batches_to_come(trainer: L.Trainer) -> list[Any]:
    """The step's batches after the current one, as returned by the loader, on the CPU."""
    loop = trainer.fit_loop
    done, size = loop.epoch_loop.batch_progress.current.ready, trainer.accumulate_grad_batches
    left = min(-done % size, loop.max_batches - done)  # the last step of an epoch may have fewer
    fetcher: Any = loop._data_fetcher
    if left <= 0 or fetcher is None:
        return []
    fetched = list(getattr(fetcher, "batches", []))  # prefetched by Lightning from a loader without a length
    if not isinstance(fetcher.iterator, Lookahead):  # a new one every epoch
        fetcher.iterator = Lookahead(fetcher.iterator)
    items = [*fetched, *fetcher.iterator.ahead(int(left) - len(fetched))]
    return [batch for batch, *_ in items[: int(left)]]
