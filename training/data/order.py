"""Order of the windows: a pure function of (seed, epoch, batch), so that a resumed run gets exactly the same batches.

Nothing here counts, shuffles in place or depends on the number of processes and workers. Global batch ``b`` of epoch
``e`` is the same for every world size; a rank serves its slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count, Fraction
from blockwright.registry.reading import read as read_settings
from blockwright.training.data.packing import Ints

PADDING = -1  # offset of an empty window


class BatchRows(list[int]):
    """A rank's part of a global batch: the first tokens of its windows.

    Args:
        offsets: first tokens
        length: tokens of a window
        batch: number of the global batch, over all epochs
        first: place of the first of these windows in the global batch
    """

    def __init__(self, offsets: Sequence[int], length: int, batch: int, first: int) -> None:
        super().__init__(offsets)
        self.length, self.batch, self.first = length, batch, first

    def __reduce__(self) -> tuple[type[BatchRows], tuple[list[int], int, int, int]]:
        return BatchRows, (list(self), self.length, self.batch, self.first)  # to a loader process


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

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Ints]]:
        """Length and first tokens of the windows of the global batches ``first`` to ``last`` − 1, over all epochs."""
        return ((self.sequence_length, offsets) for offsets in over_epochs(self.epoch, self.n_batches, first, last))


def over_epochs(epoch: Callable[[int], Ints], n_batches: int, first: int, last: int) -> Iterator[Ints]:
    """The global batches ``first`` to ``last`` − 1 of epochs that follow each other.

    Args:
        epoch: number of an epoch → its batches
        n_batches: of each epoch
        first, last: numbers over all epochs
    """
    for number in range(first // n_batches, -(-last // n_batches)):
        begin = number * n_batches
        yield from epoch(number)[max(first - begin, 0) : last - begin]


@dataclass(frozen=True)
class MixedOrder:
    """The order of training windows of several lengths: that of ``Order`` for each length by itself.

    So within an epoch of one length no token is served twice in windows of that length.

    Args:
        longest: the order of the longest windows
        lengths: of the batches
        n_tokens: N of the shorter windows, which may be cut from more documents than the longest
    """

    longest: Order
    lengths: Lengths
    n_tokens: int

    @property
    def n_windows(self) -> int:
        """Longest windows that fit into the stream without overlap."""
        return self.longest.n_windows

    @property
    def n_batches(self) -> int:
        """Global batches that the trainer calls an epoch: all have equally many tokens."""
        return self.longest.n_batches

    @property
    def batch_size(self) -> int:
        """The smallest number of windows in a batch: the number of the longest."""
        return self.longest.batch_size

    def of(self, length: int) -> Order:
        """The order of the windows of one length."""
        if length == self.longest.sequence_length:
            return self.longest
        rows = self.longest.batch_size * self.longest.sequence_length // length
        return replace(self.longest, n_tokens=self.n_tokens, sequence_length=length, batch_size=rows)

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Ints]]:
        """As ``Order.batches``."""
        endless = {length: self._from(length, count) for length, count in self.lengths.counts(first).items()}
        for length in self.lengths.of(first, last).tolist():
            yield length, next(endless[length])

    def _from(self, length: int, first: int) -> Iterator[Ints]:
        """The windows of one length from its batch ``first`` on, without end."""
        order = self.of(length)
        epoch, at = divmod(first, order.n_batches)
        while True:
            yield from order.epoch(epoch)[at:]
            epoch, at = epoch + 1, 0


class EpochBatches(Sampler[list[int]]):
    """Batch sampler of training: each ``iter`` serves the rest of one epoch of the trainer, from the current position.

    Args:
        order: of the windows
        rank: number of this data-parallel process
        world_size: data-parallel processes; divides the number of windows of every batch
        epoch_length: batches that the trainer calls an epoch; null for all. If it is shorter, the next epoch continues
            where the last one stopped, so that the whole text is seen before any of it is repeated
        consumed: called at every ``iter``, returns the number of global batches consumed by training. A loader may be
            iterated before it is needed, twice, and ahead of training by its workers' prefetching, so neither ``iter``
            nor ``next`` can count them
        start: global batches already consumed, without ``consumed``; advances when an epoch is exhausted
    """

    def __init__(
        self,
        order: Order | MixedOrder,
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
        for number, (length, offsets) in enumerate(self.order.batches(first, last), first):
            share = len(offsets) // self.world_size
            mine = offsets[self.rank * share : (self.rank + 1) * share]
            yield BatchRows(mine.tolist(), length, number, self.rank * share)
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


# --- windows of several lengths: which length each training batch has ---


PATH = "data.lengths"
EXAMPLE = "Write [{batches: 100, shares: {2048: 0.6, 512: 0.4}}, {shares: {4096: 0.6, 512: 0.4}}]"
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill [0, 1) evenly from the first on


@dataclass(frozen=True)
class Stage:
    """Batches with one mixture.

    Args:
        shares: tokens of a window → share of the tokens; they sum to 1
        batches: how many; None for all further ones
    """

    shares: Mapping[int, float]
    batches: int | None = None


@dataclass(frozen=True)
class Lengths:
    """The length of each batch, a pure function of the batch's number.

    Among the first n batches of a stage each length has its share to within a few batches, for every n. Independent
    draws would give an extension of 50 steps 46 to 74 % of long windows (95 %) where 60 % were asked for.

    Args:
        stages: in order; only the last has no number of batches
    """

    stages: tuple[Stage, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """Every length that occurs, ascending."""
        return tuple(sorted({length for stage in self.stages for length in stage.shares}))

    def of(self, first: int, last: int) -> Ints:
        """The lengths of batches ``first`` to ``last`` − 1."""
        found = np.empty(max(last - first, 0), dtype=np.int64)
        begin = 0
        for stage in self.stages:
            end = last if stage.batches is None else begin + stage.batches
            low, high = max(first, begin), min(last, end)
            if low < high:
                batches = np.arange(low - begin, high - begin)
                lengths = np.array(sorted(stage.shares), dtype=np.int64)
                ends = np.cumsum([stage.shares[length] for length in lengths.tolist()])
                at = (batches + 0.5) * GOLDEN % 1.0
                found[low - first : high - first] = lengths[np.searchsorted(ends[:-1], at, side="right")]
            begin = end
        return found

    def counts(self, before: int) -> dict[int, int]:
        """How many batches of each length are among the first ``before``."""
        found, numbers = np.unique(self.of(0, before), return_counts=True)
        return dict.fromkeys(self.all, 0) | dict(zip(found.tolist(), numbers.tolist(), strict=True))


def read_lengths(value: Any, sequence_length: int, batch_size: int) -> Lengths | None:
    """Stages as configured.

    Args:
        value: ``data.lengths``: a list of stages ``{shares: {LENGTH: SHARE}, batches: N}``; None for windows of one
            length
        sequence_length: of the longest windows, in tokens
        batch_size: windows of that length in a batch

    Raises:
        ConfigError: at ``data.lengths``
    """
    if value is None:
        return None
    found = Lengths(
        tuple(_of_lengths(stage, f"{PATH}.{i}.shares") for i, stage in enumerate(stages(value, PATH, EXAMPLE)))
    )
    for length in found.all:
        if length > sequence_length:
            rule = f"has windows of {length} tokens, longer than data.sequence_length ({sequence_length})"
            raise ConfigError(PATH, length, rule, f"Set data.sequence_length={length}, or leave these out")
        if batch_size * sequence_length % length:
            rule = f"must divide the tokens of a batch ({batch_size} windows of {sequence_length})"
            raise ConfigError(PATH, length, rule, "Choose lengths that are powers of two times each other")
    return found


def _of_lengths(stage: Written, path: str) -> Stage:
    for length in stage.shares:
        if not length.isdecimal() or int(length) < 2:
            raise ConfigError(path, length, "a length is a whole number of tokens, at least 2", EXAMPLE)
    return Stage({int(length): share for length, share in stage.shares.items()}, stage.batches)


# --- stages as written, of lengths or of sources ---


TOLERANCE = 1e-6  # of a sum of shares


@dataclass(frozen=True)
class Written:
    """A stage: the shares of what it mixes, and its batches; None for all further ones."""

    shares: dict[str, Fraction]
    batches: Count | None = None


def stages(value: Any, path: str, example: str) -> list[Written]:
    """Stages as written: a list of ``{shares: {NAME: SHARE}, batches: N}``, the last without ``batches``.

    Args:
        value: of the setting
        path: of it
        example: what a remedy shows

    Raises:
        ConfigError: one does not match, or its shares do not sum to 1
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(path, value, "must list at least one stage", example)
    found = []
    for i, each in enumerate(value):
        at, is_last = f"{path}.{i}", i == len(value) - 1
        stage = read_settings(Written, each, at)
        if (stage.batches is None) != is_last:
            rule = "the last stage has no end" if is_last else "every stage but the last ends after so many batches"
            remedy = "Leave batches out of the last stage" if is_last else example
            raise ConfigError(f"{at}.batches", stage.batches, rule, remedy)
        found.append(replace(stage, shares=summing_to_one(stage.shares, f"{at}.shares")))
    return found


def summing_to_one(shares: Mapping[str, float], path: str) -> dict[str, float]:
    """The shares above 0.

    Raises:
        ConfigError: at ``path``: they do not sum to 1
    """
    total = sum(shares.values())
    if abs(total - 1) > TOLERANCE:
        fixed = {name: round(share / total, 6) for name, share in shares.items()} if total else "shares above 0"
        raise ConfigError(path, dict(shares), f"the shares sum to {total:g}, not to 1", f"Write, for example, {fixed}")
    return {name: share for name, share in shares.items() if share}
