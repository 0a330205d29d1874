"""Which source each row comes from, and how many rows of it came before: integers, as a function of the row's number.

Nothing counts. The number of rows of each source before any row has a closed form, so a run resumes anywhere, with any
number of processes, and a change of the shares continues every source where it stands.

A stage goes down a chain of roundings. Of the first i rows of its sources 0 … k, the sources 0 … k − 1 have

    a(i) = ⌊i·p + ½⌋,  p = (their share) / (the share of 0 … k)

so row i is the source k's if a(i) = a(i + 1), and i − a(i) of its rows came before; else it is row a(i) of the sources
0 … k − 1. Every prefix of a stage has each source's share to within about a row; independent draws would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from blockwright.training.data.fingerprint import digest
from blockwright.training.data.mixture.permutation import Ints

ONE = 2**30  # the denominator of p
HALF = ONE // 2
MOST_ROWS = 2**33  # of a stage: beyond it i·p needs more than 64 bits


@dataclass(frozen=True)
class Stage:
    """Batches with one mixture.

    Args:
        weights: source → its share of the rows, in whole numbers of any sum
        batches: how many; None for all further ones
    """

    weights: Mapping[str, int]
    batches: int | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sources, sorted: the order in which they are written has no meaning."""
        return tuple(sorted(self.weights))

    @cached_property
    def roundings(self) -> tuple[int, ...]:
        """p·2^30 of the sources 1, 2, …"""
        sums = [*accumulate(self.weights[name] for name in self.names)]
        return tuple((2 * ONE * below + here) // (2 * here) for below, here in pairwise(sums))

    def counts(self, rows: int) -> list[int]:
        """How many of the first rows of the stage each source has, in the order of ``names``."""
        counted = []
        for p in reversed(self.roundings):
            below = (rows * p + HALF) // ONE
            counted.append(rows - below)
            rows = below
        return [rows, *reversed(counted)]

    def of(self, rows: Ints) -> tuple[Ints, Ints]:
        """The source of each row, as an index into ``names``, and how many of its rows in the stage came before.

        Args:
            rows: numbers within the stage, below 2^33
        """
        source, before = np.zeros_like(rows), rows.copy()
        left = np.arange(len(rows))  # rows of one of the sources 0 … k
        for k in range(len(self.roundings), 0, -1):
            i, p = before[left], self.roundings[k - 1]
            below = (i * p + HALF) // ONE
            own = below == ((i + 1) * p + HALF) // ONE
            source[left[own]], before[left[own]] = k, (i - below)[own]
            before[left[~own]], left = below[~own], left[~own]
        return source, before


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, one after the other.

    Args:
        stages: in order; only the last has no number of batches
        batch_size: rows of a batch
    """

    stages: tuple[Stage, ...]
    batch_size: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every source of any stage, sorted."""
        return tuple(sorted({name for stage in self.stages for name in stage.weights}))

    def stage(self, batch: int) -> int:
        """The number, from 0, of the stage that a batch belongs to."""
        return sum(1 for _ in self._until(batch + 1)) - 1

    def of(self, batch: int) -> tuple[Ints, Ints]:
        """The source of each row of a batch, as an index into ``names``, and how many of its rows came before."""
        stage, first, _ = [*self._until(batch + 1)][-1]
        rows = np.arange((batch - first) * self.batch_size, (batch - first + 1) * self.batch_size)
        source, before = stage.of(rows)
        source = np.array([self.names.index(name) for name in stage.names])[source]
        return source, before + np.array(self.counts(first))[source]

    def counts(self, before: int) -> list[int]:
        """How many rows each source has, in the order of ``names``, in all batches before one."""
        total = dict.fromkeys(self.names, 0)
        for stage, first, last in self._until(before):
            for name, rows in zip(stage.names, stage.counts((last - first) * self.batch_size), strict=True):
                total[name] += rows
        return [*total.values()]

    def prefix(self, before: int) -> str:
        """Digest of the schedule of all batches before one: stages that begin later do not change it."""
        past = [[stage.names, stage.roundings, last - first] for stage, first, last in self._until(before)]
        return digest(self.batch_size, past)

    def _until(self, last: int) -> Iterator[tuple[Stage, int, int]]:
        """The stages of the batches before ``last``, each with its first batch and the one after its last."""
        first = 0
        for stage in self.stages:
            if first >= last:
                return
            end = last if stage.batches is None else min(first + stage.batches, last)
            yield stage, first, end
            first = end
