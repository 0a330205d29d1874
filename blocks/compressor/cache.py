"""The memory of an attention that keeps the last tokens as they are, and means of windows of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.cache.ring import Ring
from blockwright.blocks.compressor.pool import Ends
from blockwright.registry import BlockError


class Means(NamedTuple):
    """What a cache holds of a pool.

    width: of a mean
    projected: width of what an open window needs of a token
    span: tokens that a mean is over
    """

    width: int
    projected: int
    span: int


class WindowedCache(Cache):
    """The last ``window`` keys, what the open windows need of their tokens, and the means of the closed ones.

    Never quantised, like a ``State``: most of it is means of many tokens already.

    Args:
        batch: rows
        length: capacity in tokens
        window: keys that are kept
        width: H of a key
        every: tokens of a window of the means
        means: name → what is held of each pool; empty for none
        dtype, device: of the buffers
    """

    overwrites = True
    quantises = False

    def __init__(
        self,
        batch: int,
        length: int,
        window: int,
        width: int,
        every: int,
        means: Mapping[str, Means],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.recent = Ring(batch, min(window, length), {"k": (1, width)}, dtype, device)
        span = max((held.span for held in means.values()), default=1)
        self.open = Ring(batch, span, {name: (held.projected,) for name, held in means.items()}, dtype, device)
        super().__init__(batch, length, {}, dtype, device)
        self.every = every
        # One more than there can be: a token that closes no window writes its unfinished mean to the next one's place.
        held_means = length // every + 1
        self.means = {
            name: torch.zeros(batch, held_means, held.width, dtype=dtype, device=device) for name, held in means.items()
        }
        self._all_means = self.means

    @property
    def length(self) -> int:
        return self.recent.length

    @length.setter
    def length(self, tokens: int) -> None:
        self.recent.length = self.open.length = tokens

    @property
    def buffers(self) -> dict[str, Tensor]:
        opened = {f"open.{name}": values for name, values in self.open.buffers.items()}
        return {**self.recent.buffers, **opened, **{f"means.{name}": values for name, values in self.means.items()}}

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self.recent.take(rows)
        self.open.take(rows)
        self.means = self._all_means = {name: values[rows] for name, values in self.means.items()}

    def use(self, rows: int) -> None:
        self.recent.use(rows)
        self.open.use(rows)
        self.means = {name: values[:rows] for name, values in self._all_means.items()}

    def _put(self, row: int, other: Cache, source: int, n: int) -> None:
        assert isinstance(other, WindowedCache)
        self.recent._put(row, other.recent, source, n)
        self.open._put(row, other.open, source, n)
        for held, theirs in zip(self.means.values(), other.means.values(), strict=True):
            closed = n // self.every  # of windows counted from the start of the document, not of the row
            held[row, :closed] = theirs[source, :closed]

    def _shift(self, by: int) -> None:
        self.recent._shift(by)
        self.open._shift(by)

    def mark(self, ahead: int | None = None) -> Mark:
        """As in ``Cache``. The means of the windows that are closed are never overwritten."""
        recent, opened = self.recent.mark(ahead), self.open.mark(ahead)
        return Mark(self.length, ahead, {}, recent.after, (recent, opened))

    def _restore(self, mark: Mark, kept: Sequence[int]) -> None:
        for ring, of_ring in zip((self.recent, self.open), mark.parts, strict=True):
            ring._restore(of_ring, kept)
        # The means that the tokens after ``kept`` have written, each row's counted from the start of its document.
        for held in self.means.values():
            own = torch.tensor(kept, dtype=torch.int64, device=held.device) + mark.length
            own = own - (0 if self.padding is None else self.padding)
            later = own[:, None] // self.every + torch.arange((self.length - mark.length) // self.every + 2).to(own)
            rows = torch.arange(len(held), device=held.device)[:, None]
            held[rows, later.clamp(max=held.shape[1] - 1)] = 0

    def _delay(self, rows: list[int], by: int) -> None:
        self.recent._delay(rows, by)
        self.open._delay(rows, by)

    def remember(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys [B,T,1,H] of new tokens; returns the keys that these may see, and the indices of these in their
        rows, [S]."""
        if self.length + k.shape[1] > self.room:
            rule = f"the cache has room for {self.room} tokens"
            raise BlockError("length", self.length + k.shape[1], rule, "Make a longer cache")
        (keys,) = self.recent.append(k)
        return keys, self.recent.indices(k.device)

    def opened(self, *projected: Tensor) -> tuple[Tensor, ...]:
        """Store what windows need of new tokens, [B,T,·]; returns that of the tokens before as well, in order."""
        T = projected[0].shape[1]
        found = self.open.append(*projected)
        if T == 1:
            order = self.open.indices(projected[0].device).argsort()
            found = tuple(values[:, order] for values in found)
        return found

    def close(self, ends: Ends, *means: Tensor) -> tuple[Tensor, ...]:
        """Store the means [B,n,W] of windows; returns those of all windows that may be closed, in order."""
        rows = torch.arange(len(means[0]), device=means[0].device)[:, None]
        for held, new in zip(self.means.values(), means, strict=True):
            held[rows, ends.number] = new
        return tuple(held[:, : self.length // self.every] for held in self.means.values())
