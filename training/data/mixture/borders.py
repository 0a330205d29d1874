"""Where documents begin in a shard of tokens.

They are read off the ids wherever an id marks them: an index of them needs 8 bytes a document in memory, 8 GB for 10⁹.
A shard begins a document too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blockwright.training.data.mixture.maps import mapped
from blockwright.training.data.mixture.permutation import Ints

Flags = npt.NDArray[np.bool_]


class Borders(ABC):
    """Where documents begin."""

    def begins(self, ids: Ints, at: int) -> Flags:
        """Whether each of consecutive tokens begins a document; of the first it is known only if an id says so.

        Args:
            ids: of the tokens [n]
            at: place of the first one in the shard
        """
        found = self.within(ids, at)
        found[:1] |= at == 0
        return found

    @abstractmethod
    def within(self, ids: Ints, at: int) -> Flags:
        """``begins`` within the shard, of its first token anything."""


@dataclass(frozen=True)
class After(Borders):
    """A document begins after an id.

    Args:
        eos: that ends each document
    """

    eos: int

    def within(self, ids: Ints, at: int) -> Flags:
        found = np.zeros(len(ids), dtype=bool)
        found[1:] = ids[:-1] == self.eos
        return found


@dataclass(frozen=True)
class At(Borders):
    """A document begins at an id.

    Args:
        bos: that begins each document
    """

    bos: int

    def within(self, ids: Ints, at: int) -> Flags:
        return ids == self.bos


@dataclass(frozen=True)
class Listed(Borders):
    """An index lists the documents' starts, or their ends, which are the starts of the next.

    Args:
        path: of the index
        dtype: of its places, which ascend
        offset: bytes before the first
        n: how many
        unit: of the places: 1 for tokens, else bytes of a token
    """

    path: Path
    dtype: str
    offset: int
    n: int
    unit: int = 1

    def within(self, ids: Ints, at: int) -> Flags:
        places = mapped(self.path, self.dtype, self.offset, self.n)
        first, last = np.searchsorted(places, np.array([at, at + len(ids)], places.dtype) * self.unit)
        found = np.zeros(len(ids), dtype=bool)
        found[places[first:last].astype(np.int64) // self.unit - at] = True
        return found


@dataclass(frozen=True)
class Nowhere(Borders):
    """A shard is one document."""

    def within(self, ids: Ints, at: int) -> Flags:
        return np.zeros(len(ids), dtype=bool)
