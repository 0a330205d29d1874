"""Keys that queries see some of: those of the last tokens, and others beside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.kernels.few_keys import taken


class Near(NamedTuple):
    """Keys of the last tokens, the queries' own last.

    keys: [B,S,1,H]
    positions: [B|1,S]
    at: [S], indices in their rows; of one query in any order
    segments: [B,S], their documents; None: each row is one
    padding: [B], tokens of padding at the start of each row; None for none
    """

    keys: Tensor
    positions: Tensor
    at: Tensor
    segments: Tensor | None
    padding: Tensor | None

    def before(self, T: int, start: int, stop: int, window: int) -> Near:
        """What the queries from ``start`` to ``stop`` of T see some of, their own keys last."""
        first = self.keys.shape[1] - T
        keys = slice(max(0, first + start - window + 1), first + stop)
        segments = None if self.segments is None else self.segments[:, keys]
        return Near(self.keys[:, keys], self.positions[:, keys], self.at[keys], segments, self.padding)

    def seen(self, n_queries: int, window: int) -> Tensor:
        """[B|1,t,S]: whether each of the last queries sees a key. Padding sees padding, so that it sees something."""
        last = self.at.max() if n_queries == 1 else self.at[-1]
        query = (last - torch.arange(n_queries - 1, -1, -1, device=self.at.device))[:, None]
        seen = ((self.at <= query) & (self.at > query - window))[None]
        if self.segments is not None:
            seen = seen & (self.segments[:, -n_queries:, None] == self.segments[:, None])
        if self.padding is not None:
            first = self.padding[:, None, None]
            seen = seen & ((self.at >= first) | (query < first))
        return seen


class Source(NamedTuple):
    """Keys of one kind.

    seen: [B|1,t,S], whether some queries see them
    keys: [B,S,1,H]
    positions: [B|1,S]
    """

    seen: Tensor
    keys: Tensor
    positions: Tensor

    def some(self, rows: slice) -> Source:
        """The same keys for some of the queries."""
        return self._replace(seen=self.seen[:, rows])

    def taken(self, index: Tensor) -> Source:
        """The keys of indices [B,t,K], those of each query as a row: B·t of them."""
        seen = self.seen.expand(*index.shape[:2], -1).gather(-1, index).flatten(0, 1)[:, None]
        return Source(seen, taken(self.keys, index), taken(self.positions, index))
