"""Windows of several lengths: which length each training batch has.

A stage mixes lengths by their share of the tokens; stages follow each other, so that windows may grow. Every batch has
one length and the same number of tokens: twice as long, half as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count, Share
from blockwright.registry.reading import Remedy
from blockwright.registry.reading import read as read_settings

Ints = npt.NDArray[np.int64]
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
                found[low - first : high - first] = _mixed(stage.shares, np.arange(low - begin, high - begin))
            begin = end
        return found

    def counts(self, before: int) -> dict[int, int]:
        """How many batches of each length are among the first ``before``."""
        found, numbers = np.unique(self.of(0, before), return_counts=True)
        return dict.fromkeys(self.all, 0) | dict(zip(found.tolist(), numbers.tolist(), strict=True))


def _mixed(shares: Mapping[int, float], batches: Ints) -> Ints:
    lengths = np.array(sorted(shares), dtype=np.int64)
    ends = np.cumsum([shares[length] for length in lengths.tolist()])
    at = (batches + 0.5) * GOLDEN % 1.0
    return lengths[np.searchsorted(ends[:-1], at, side="right")]


def read(value: Any, sequence_length: int, batch_size: int) -> Lengths | None:
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
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(PATH, value, "must list at least one stage", EXAMPLE)
    stages = tuple(_stage(f"{PATH}.{i}", each, i == len(value) - 1) for i, each in enumerate(value))
    found = Lengths(stages)
    for length in found.all:
        if length > sequence_length:
            rule = f"has windows of {length} tokens, longer than data.sequence_length ({sequence_length})"
            raise ConfigError(PATH, length, rule, f"Set data.sequence_length={length}, or leave these out")
        if batch_size * sequence_length % length:
            rule = f"must divide the tokens of a batch ({batch_size} windows of {sequence_length})"
            raise ConfigError(PATH, length, rule, "Choose lengths that are powers of two times each other")
    return found


@dataclass(frozen=True)
class _Written:
    """A stage as written, with lengths as text."""

    shares: Annotated[dict[str, Share], Remedy(EXAMPLE)]
    batches: Annotated[Count, Remedy(EXAMPLE)] | None = None


def _stage(path: str, value: Any, is_last: bool) -> Stage:
    stage = read_settings(_Written, value, path)
    for length in stage.shares:
        if not length.isdecimal() or int(length) < 2:
            raise ConfigError(f"{path}.shares", length, "a length is a whole number of tokens, at least 2", EXAMPLE)
    if abs(sum(stage.shares.values()) - 1) > 1e-6:
        rule = f"the shares of a stage's tokens sum to {sum(stage.shares.values()):g}, not to 1"
        raise ConfigError(f"{path}.shares", stage.shares, rule, "Write e.g. {4096: 0.6, 512: 0.4}")
    if (stage.batches is None) != is_last:
        rule = "the last stage has no end" if is_last else "every stage but the last ends after so many batches"
        remedy = "Leave batches out of the last stage" if is_last else EXAMPLE
        raise ConfigError(f"{path}.batches", stage.batches, rule, remedy)
    return Stage({int(length): float(share) for length, share in stage.shares.items()}, stage.batches)
