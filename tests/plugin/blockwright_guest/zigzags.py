"""Data of a package's own: rows of ids that climb by a step of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch.utils.data import DataLoader

from blockwright import ConfigError, DataModule, register

Count = Annotated[int, Ge(1)]


@register("data", "zigzags")
class Ladders(DataModule):
    """Row r of batch b: ids ``start + step · t mod vocabulary``, start and step drawn by (seed, b).

    Args:
        vocabulary: ids 0 to vocabulary − 1
        sequence_length: tokens of a row
        batch_size: rows of a batch
        batches: of an epoch
        largest_step: steps are 1 to this
        seed: of the draws
    """

    def __init__(
        self,
        vocabulary: Count = 64,
        sequence_length: Count = 32,
        batch_size: Count = 8,
        batches: Count = 100,
        largest_step: Count = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocabulary, self.sequence_length, self.batch_size = vocabulary, sequence_length, batch_size
        self.batches, self.largest_step, self.seed, self.done = batches, largest_step, seed, 0

    def check(self) -> None:
        if self.largest_step >= self.vocabulary:
            rule = f"must be less than the vocabulary (data.vocabulary = {self.vocabulary})"
            raise ConfigError("data.largest_step", self.largest_step, rule, "Climb by smaller steps")

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        drawn = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        start = torch.randint(self.vocabulary, (self.batch_size, 1), generator=drawn)
        step = torch.randint(1, self.largest_step + 1, (self.batch_size, 1), generator=drawn)
        row = (start + step * torch.arange(self.sequence_length + 1)) % self.vocabulary
        return {"tokens": row[:, :-1], "targets": row[:, 1:]}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Batches(self, self._consumed), batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch(-1), self.batch(-2)], batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader

    def _consumed(self) -> int:
        if self.trainer is None:
            return self.done
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._consumed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["batches"]


class _Batches(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The batches of an epoch that are still to come."""

    def __init__(self, data: Ladders, consumed: Any) -> None:
        self.data, self.consumed = data, consumed

    def __len__(self) -> int:
        return self.data.batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        first = self.consumed()
        last = (first // self.data.batches + 1) * self.data.batches
        return map(self.data.batch, range(first, last))
