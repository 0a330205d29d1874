"""The order of a mixture's windows: a pure function of seed, schedule and the number of the batch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.ranges import Fraction
from blockwright.registry.reading import Remedy, checked
from blockwright.training.data.fingerprint import digest
from blockwright.training.data.order import stages, summing_to_one

# --- permutations that are computed place by place: a Feistel network, without a table of what it permutes ---


Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

ROUNDS = 6
STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: makes the keys of the rounds differ
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def draw(*parts: str | int) -> tuple[int, int]:
    """Two independent numbers in [0, 2^64) that are a function of the parts: the first half of their SHA-256."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def permuted(places: npt.ArrayLike, n: npt.ArrayLike, keys: npt.ArrayLike) -> Ints:
    """Where keyed permutations of [0, n) send places. The arguments are broadcast against each other.

    Args:
        places: in [0, n)
        n: lengths of what is permuted, from 1 to 2^53
        keys: of the permutations, in [0, 2^64)

    Returns:
        the new places, in [0, n); for equal n and key no two places share one
    """
    whole = np.broadcast_arrays(places, n, np.asarray(keys, np.uint64))
    x, lengths, keys = (each.astype(np.uint64).ravel() for each in whole)
    # Half of the bits of the places of [0, n), rounded up, at least 1
    bits = np.frexp((lengths - np.uint64(1)).astype(np.float64))[1]
    halves = np.maximum(1, -(-bits // 2)).astype(np.uint64)
    x = _network(x, halves, keys)
    while (beyond := x >= lengths).any():  # the network permutes up to 4n places: walk its cycle back into [0, n)
        x[beyond] = _network(x[beyond], halves[beyond], keys[beyond])
    return x.astype(np.int64).reshape(whole[0].shape)


def _network(x: Bits, halves: Bits, keys: Bits) -> Bits:
    """The Feistel network: a permutation of [0, 4^halves)."""
    mask = (np.uint64(1) << halves) - np.uint64(1)
    left, right = x >> halves, x & mask
    for _ in range(ROUNDS):
        keys = keys + STEP
        left, right = right, left ^ (_mixed(right + keys) & mask)
    return (left << halves) | right


def _mixed(x: Bits) -> Bits:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        x = (x ^ (x >> shift)) * multiplier
    return x ^ (x >> SHIFTS[-1])


# --- which source each row comes from, and how many rows of it came before, by the number of the row ------------------


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


# --- the stages of a mixture as configured: shares by source, and how many batches ---


STAGES = "data.stages"
EXAMPLE = "Write [{shares: {web: 0.7, code: 0.3}, batches: 9000}, {shares: {web: 0.4, code: 0.6}}]"


def read_stages(value: Any, sources: Collection[str]) -> tuple[Stage, ...] | None:
    """Stages as configured; None where shares follow the sizes of the sources.

    Args:
        value: ``data.stages``
        sources: their names

    Raises:
        ConfigError: at ``data.stages``
    """
    if value is None:
        return None
    written = enumerate(stages(value, STAGES, EXAMPLE))
    found = tuple(Stage(weights_of(each.shares, f"{STAGES}.{i}.shares", sources), each.batches) for i, each in written)
    for name in sources:
        if not any(name in stage.weights for stage in found):
            remedy = f"Give it a share, or leave it out: ~data.sources.{name}"
            raise ConfigError(f"data.sources.{name}", name, "is in no stage, so it would never be read", remedy)
    return found


def weights_of(value: Any, path: str, sources: Collection[str]) -> dict[str, int]:
    """Shares that sum to 1 as whole numbers; sources with a share of 0 are left out.

    Args:
        value: source → share
        path: of the setting
        sources: names of all

    Raises:
        ConfigError: at ``path``
    """
    shares = checked(value, Annotated[dict[str, Fraction], Remedy("Write {web: 0.7, code: 0.3}")], path)
    for name, share in shares.items():
        if name not in sources:
            raise ConfigError(f"{path}.{name}", share, "there is no such source", did_you_mean(name, sources))
        if share and not round(share * ONE):
            rule = f"is below {1 / ONE:.0e}, the least share"
            raise ConfigError(f"{path}.{name}", share, rule, "Raise it, or write 0")
    return {name: round(share * ONE) for name, share in summing_to_one(shares, path).items()}
