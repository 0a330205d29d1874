"""The base of data modules whose rows are made when they are served: nothing is read, and no row comes twice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.utils.data import Dataset

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.registry import register
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.modules.batches import Batches, Feeding, RowDataModule
from blockwright.training.data.order import PADDING, LineBatches
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


# --- rows to copy: a random string again and again ---


@dataclass(frozen=True)
class Strings:
    """Random strings that fill a row by repetition.

    A row is s₁…sₙ s₁…sₙ s₁…, n drawn evenly from ``shortest`` to ``longest``, each symbol from all. A position is
    scored once a symbol of the repetition was seen: before, nothing says that it begins. So a model that looks back n
    positions, or finds the earlier occurrence of the last symbols (induction), can know every scored one.

    Args:
        symbols: the ids to draw from [S]
        sequence_length: T, tokens of a row
        shortest, longest: bounds of n
        seed: of the rows of training; val and test have the same rows under every seed
    """

    symbols: Ints
    sequence_length: int
    shortest: int
    longest: int
    seed: int

    def row(self, split: Split, number: int) -> tuple[Ints, Ints]:
        """Tokens and targets [T] of a row."""
        T, seed = self.sequence_length, self.seed if split == "train" else 0
        # RandomState's streams never change; those of numpy's newer Generator may between releases.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([SPLITS.index(split), seed, number])))
        n = random.randint(self.shortest, self.longest + 1)
        row = np.resize(self.symbols[random.randint(len(self.symbols), size=n)], T + 1).astype(np.int64)
        return row[:-1], np.where(np.arange(T) < n, IGNORED, row[1:])


class CopyRows(Dataset[dict[str, Tensor]]):
    """Batches of such rows.

    Args:
        strings: what the rows are
        split: that they belong to
    """

    def __init__(self, strings: Strings, split: Split) -> None:
        self.strings, self.split = strings, split

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """The batch of these rows, −1 for one that is not scored: tokens, targets [B, T] and n_bytes [B]."""
        drawn = [self.strings.row(self.split, max(row, 0)) for row in rows]
        tokens = np.stack([tokens for tokens, _ in drawn])
        targets = np.stack([targets for _, targets in drawn])
        targets[np.array(rows) == PADDING] = IGNORED
        batch = {"tokens": tokens, "targets": targets, "n_bytes": (targets != IGNORED).sum(axis=1)}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    __getitem__ = __getitems__  # called by a loader whose items are lists, without a batch sampler


# --- the data module of strings to copy, ``data=copying``: a task on which a known effect is as large as it can be ---


LETTERS = "".join(map(chr, range(ord("!"), ord("~") + 1)))  # 94 characters of one byte


@register("data", "copying")
class CopyingDataModule(FreshRowDataModule):
    """Rows of a random string again and again; its repetitions are scored (training/data/modules/fresh.py).

    With ``shortest`` = ``longest`` a model may copy from a fixed distance, which one layer learns; with a range it has
    to find the earlier occurrence, which takes two (Olsson et al. 2022, arXiv 2209.11895). A model that knows nothing
    has a loss of ln ``symbols``. Nothing is read, and no row is served twice.

    Args:
        feeding: how rows are made into batches; the tokenizer has an id for each symbol
        symbols: different characters
        shortest, longest: tokens of a string; less than a row has
        held_out: rows of val and of test
    """

    def __init__(
        self,
        feeding: Feeding,
        symbols: Annotated[int, Ge(2), Le(len(LETTERS))] = 64,
        shortest: Count = 32,
        longest: Count = 32,
        held_out: Count = 128,
    ) -> None:
        super().__init__(feeding, held_out)
        self.letters, self.shortest, self.longest = LETTERS[:symbols], shortest, longest
        if longest < shortest:
            raise ConfigError("data.longest", longest, f"must be at least shortest ({shortest})", "Raise it")
        if longest >= self.sequence_length:
            rule = f"fills a row (data.sequence_length = {self.sequence_length}), so that nothing of it is repeated"
            raise ConfigError("data.longest", longest, rule, f"Set data.longest={self.sequence_length // 2}")
        if (unequal := len(self._ids())) != symbols:
            rule = f"must be one token each, and the tokenizer makes {unequal} of them"
            raise ConfigError("data.symbols", symbols, rule, "Write data/tokenizer=chars, or data/tokenizer=bytes")

    def _ids(self) -> Any:
        """The ids of the symbols."""
        if not self.tokenizer.fitted:
            self.tokenizer.fit([self.letters])
        return np.unique(self.tokenizer.encode(self.letters)).astype(np.int64)

    def _rows(self, split: Split) -> CopyRows:
        return CopyRows(Strings(self._ids(), self.sequence_length, self.shortest, self.longest, self.seed), split)

    def _made_by(self) -> dict[str, Any]:
        return {"symbols": len(self.letters), "shortest": self.shortest, "longest": self.longest}
