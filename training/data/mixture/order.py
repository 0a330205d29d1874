"""The order of a mixture's windows: a pure function of seed, schedule and the number of the batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from blockwright.training.data.mixture.permutation import Bits, Ints, draw, permuted
from blockwright.training.data.mixture.shares import Schedule


@dataclass(frozen=True)
class MixtureOrder:
    """The order of training windows of several sources, with the interface of ``order.Order``.

    Each epoch of a source lays windows end to end around the ring of its tokens, from a place of its own, and permutes
    them. So within an epoch no token is served twice. The order of a source's windows depends on the seed and its name,
    and on nothing else: two runs with other shares read each source in the same order.

    All sources are in one address space, one behind the other, in the order of ``schedule.names``.

    Args:
        schedule: which source each row comes from
        n_tokens: tokens of each source, in the order of ``schedule.names``
        sequence_length: T, tokens of a window
        seed: of the order, ≥ 0
        n_batches: global batches of the run
    """

    schedule: Schedule
    n_tokens: tuple[int, ...]
    sequence_length: int
    seed: int
    n_batches: int

    @property
    def batch_size(self) -> int:
        """Windows of a global batch."""
        return self.schedule.batch_size

    @property
    def n_windows(self) -> int:
        """Windows of the run."""
        return self.n_batches * self.batch_size

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Windows of an epoch of each source."""
        return tuple(n // self.sequence_length for n in self.n_tokens)

    @cached_property
    def bases(self) -> Ints:
        """Address of the first token of each source."""
        return np.cumsum([0, *self.n_tokens[:-1]], dtype=np.int64)

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Ints]]:
        """Length and addresses of the windows of the global batches ``first`` to ``last`` − 1."""
        return ((self.sequence_length, self.batch(number)) for number in range(first, last))

    def batch(self, number: int) -> Ints:
        """The addresses of the first tokens of the windows of a global batch [batch_size].

        Its rows are permuted, so that a rank with few of them does not see one source only.
        """
        source, before = self.schedule.of(number)
        windows, tokens = np.array(self.windows)[source], np.array(self.n_tokens)[source]
        epoch, place = np.divmod(before, windows)
        keys, begins = self._draws(source, epoch)
        window = permuted(place, windows, keys)
        address = self.bases[source] + (begins + window * self.sequence_length) % tokens
        return address[permuted(np.arange(self.batch_size), self.batch_size, draw(self.seed, "rows", number)[0])]

    def epochs(self, before: int) -> dict[str, float]:
        """How often each source has been read in all batches before one."""
        read = zip(self.schedule.names, self.schedule.counts(before), self.windows, strict=True)
        return {name: rows / windows for name, rows, windows in read}

    def _draws(self, source: Ints, epoch: Ints) -> tuple[Bits, Ints]:
        """The key of the permutation of each row's epoch, and the token of the source where that epoch begins."""
        pairs, which = np.unique(np.stack([source, epoch]), axis=1, return_inverse=True)
        draws = [_draw(self.seed, self.schedule.names[k], number) for k, number in pairs.T.tolist()]
        keys = np.array([key for key, _ in draws], dtype=np.uint64)
        begins = np.array([at % self.n_tokens[k] for (_, at), k in zip(draws, pairs[0].tolist(), strict=True)])
        return keys[which.ravel()], begins[which.ravel()]


_draw = functools.lru_cache(maxsize=4096)(draw)  # of the epochs that the batches of now are in
