"""Rows to copy: a random string again and again. They need no text and no file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.order import PADDING
from blockwright.training.data.packing import Ints


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
