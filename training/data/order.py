"""Order of the windows: a pure function of (seed, epoch, batch), so that a resumed run gets exactly the same batches.

Nothing here counts, shuffles in place or depends on the number of processes and workers. Global batch ``b`` of epoch
``e`` is the same for every world size; a rank serves its slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from training.data.packing import Ints

PADDING = -1  # offset of an empty window


@dataclass(frozen=True)
class Order:
    """The order of training windows.

    Each epoch lays windows end to end around the ring of N tokens, starting at a random offset, and shuffles them. So
    within an epoch no token is served twice, and epochs cut the text at different places. The rest (less than a batch
    and a window) differs from epoch to epoch.

    Args:
        n_tokens: N, tokens of the stream
        sequence_length: T, tokens of a window
        batch_size: windows of a global batch
        seed: of the order, ≥ 0
    """

    n_tokens: int
    sequence_length: int
    batch_size: int
    seed: int

    @property
    def n_windows(self) -> int:
        """Windows that fit into the stream without overlap."""
        return self.n_tokens // self.sequence_length

    @property
    def n_batches(self) -> int:
        """Global batches of an epoch, the same for every epoch; the last incomplete one is dropped."""
        return self.n_windows // self.batch_size

    def epoch(self, epoch: int) -> Ints:
        """The global batches of an epoch as the first tokens of their windows [n_batches, batch_size].

        Args:
            epoch: number of the epoch, ≥ 0
        """
        # RandomState's streams never change; those of numpy's newer Generator may between releases.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
        first = random.randint(self.n_tokens, dtype=np.int64)  # the dtype affects the value
        windows = random.permutation(self.n_windows)[: self.n_batches * self.batch_size]
        offsets = (first + windows.astype(np.int64) * self.sequence_length) % self.n_tokens
        return offsets.reshape(self.n_batches, self.batch_size)


class EpochBatches(Sampler[list[int]]):
    """Batch sampler of training: each ``iter`` serves the rest of one epoch of the trainer, from the current position.

    Args:
        order: of the windows
        rank: number of this data-parallel process
        world_size: data-parallel processes; divides ``order.batch_size``
        epoch_length: batches that the trainer calls an epoch; null for all. If it is shorter, the next epoch continues
            where the last one stopped, so that the whole text is seen before any of it is repeated
        consumed: called at every ``iter``, returns the number of global batches consumed by training. A loader may be
            iterated before it is needed, twice, and ahead of training by its workers' prefetching, so neither ``iter``
            nor ``next`` can count them
        start: global batches already consumed, without ``consumed``; advances when an epoch is exhausted
    """

    def __init__(
        self,
        order: Order,
        rank: int = 0,
        world_size: int = 1,
        epoch_length: int | None = None,
        consumed: Callable[[], int] | None = None,
        start: int = 0,
    ) -> None:
        self.order, self.rank, self.world_size, self.start = order, rank, world_size, start
        self.epoch_length = min(epoch_length or order.n_batches, order.n_batches)
        self.consumed = consumed

    def __len__(self) -> int:
        return self.order.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed() if self.consumed else self.start
        return self._batches(first, (first // self.epoch_length + 1) * self.epoch_length)

    def _batches(self, first: int, last: int) -> Iterator[list[int]]:
        share = self.order.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for epoch in range(first // len(self), -(-last // len(self))):
            begin = epoch * len(self)
            for batch in self.order.epoch(epoch)[max(first - begin, 0) : last - begin]:
                yield batch[mine].tolist()
        self.start = last


class LineBatches(Sampler[list[int]]):
    """Batch sampler of evaluation: every window of a split once, in order, with equally many batches on every rank.

    If the ranks cannot share the last batch evenly, it is filled with empty windows, whose targets are all ignored.

    Args:
        n_tokens: N, tokens of the split
        sequence_length: T, tokens of a window
        batch_size: windows of a global batch
        n_windows: maximum number of windows, evenly spaced over the split; null for all
        rank: number of this data-parallel process
        world_size: data-parallel processes; divides ``batch_size``
    """

    def __init__(
        self,
        n_tokens: int,
        sequence_length: int,
        batch_size: int,
        n_windows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        there_are = -(-(n_tokens - 1) // sequence_length)  # the last token is only ever a target
        wanted = min(n_windows or there_are, there_are)
        offsets = np.arange(wanted) * there_are // wanted * sequence_length
        self.offsets: Ints = np.append(offsets, [PADDING] * (-wanted % world_size)).astype(np.int64)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.offsets) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self.offsets), self.batch_size):
            batch = self.offsets[first : first + self.batch_size]
            share = len(batch) // self.world_size
            yield batch[self.rank * share : (self.rank + 1) * share].tolist()
