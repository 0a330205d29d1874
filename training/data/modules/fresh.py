"""The base of data modules whose rows are made when they are served: nothing is read, and no row comes twice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from blockwright.training.data.corpus import Split
from blockwright.training.data.modules.batches import Batches, Feeding, RowDataModule
from blockwright.training.data.order import LineBatches
from blockwright.training.data.packing import Ints

EPOCH = 1000  # batches that the trainer calls an epoch


@dataclass(frozen=True)
class FreshOrder:
    """Batch b has the rows b·B to (b + 1)·B − 1, over all epochs.

    Args:
        batch_size: B, rows of a global batch
    """

    batch_size: int
    n_batches: int = EPOCH

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Ints]]:
        """As ``Order.batches``."""
        return ((1, np.arange(b * self.batch_size, (b + 1) * self.batch_size)) for b in range(first, last))


class FreshRowDataModule(RowDataModule):
    """Batches of rows that are made when they are served. A subclass makes them.

    Args:
        feeding: how rows are made into batches
        held_out: rows of val and of test
    """

    def __init__(self, feeding: Feeding, held_out: int) -> None:
        super().__init__(feeding)
        self.held_out = held_out

    @abstractmethod
    def _rows(self, split: Split) -> Dataset[dict[str, Tensor]]:
        """The rows of a split, any of which can be made alone."""

    @abstractmethod
    def _made_by(self) -> dict[str, Any]:
        """What determines the rows of training, except the tokenizer, their length and the seed."""

    def _prepare(self) -> None:
        pass

    def setup(self, stage: str | None = None) -> None:
        """Check that the processes can share the batches.

        Raises:
            ConfigError: they cannot
        """
        self._listen()
        self._begin(stage)

    @property
    def order(self) -> FreshOrder:  # type: ignore[override]
        return FreshOrder(self.batch_size)

    def _train_rows(self) -> Dataset[dict[str, Tensor]]:
        return self._rows("train")

    def val_dataloader(self) -> Batches:
        return self._evaluation("val")

    def test_dataloader(self) -> Batches:
        return self._evaluation("test")

    def _evaluation(self, split: Split) -> Batches:
        line = LineBatches(self.held_out + 1, 1, self.eval_batch_size, self.eval_windows, *self._share())
        return self._loader(self._rows(split), batch_sampler=line)

    def _identity(self) -> dict[str, Any]:
        rows = {"sequence_length": self.sequence_length, "batch_size": self.batch_size, "seed": self.seed}
        return {**self._made_by(), **rows}
