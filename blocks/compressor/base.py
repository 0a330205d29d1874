"""The contract of ``compressor``: means of windows of tokens, which an attention sees beside the last tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block, Drawn, Kind
from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.cache.fixed import Ring
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.selector.base import Asked
from blockwright.registry import BlockError, family

# Sums of windows of tokens: where windows close, and the learned mean that each becomes.


class Ends(NamedTuple):
    """The tokens at which windows close, n of each row, those without a window last.

    at: [B,n], indices of the tokens in their rows
    number: [B,n] of the window in its document, from 0; where none closes that of the row's open window
    real: [B,n], whether there is such a token
    """

    at: Tensor
    number: Tensor
    real: Tensor


def ends_of(positions: Tensor, every: int, real: Tensor | None = None) -> Ends:
    """The tokens at positions [B,T] that are the last of a window of ``every`` tokens of their document.

    n is the most that T tokens in one run can have; it does not depend on the numbers, so that nothing waits for them.

    Args:
        real: [B,T], which of them are tokens and not padding before them; None: all
    """
    last = (positions + 1) % every == 0
    last = last if real is None else last & real
    n = -(-positions.shape[1] // every)
    index = last.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
    real, still_open = last.gather(1, index), (positions[:, -1:] + 1) // every
    return Ends(index, torch.where(real, positions.gather(1, index) // every, still_open), real)


class Pool(nn.Module):
    """The mean of a window's tokens, weighted in each channel by a softmax over the window.

    With u = W_value x, z = W_gate x and a bias b of each place in the window: Σ_j softmax_j(z_j + b_j) ⊙ u_j. One that
    overlaps has channels twice: window w is the mean of the first ones over window w − 1 and of the second ones over
    window w. A window of one token has no gate: its mean is u.

    Args:
        d_model: D
        width: W of the mean
        every: tokens of a window
        overlapping: whether the mean is over the window before as well
        apart: whether nothing that it reads follows its gradient
        places: whether there is a bias of each place
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"place": "table"}

    def __init__(
        self, d_model: int, width: int, every: int, overlapping: bool, apart: bool = False, places: bool = True
    ) -> None:
        super().__init__()
        self.apart = apart
        self.width, self.every, self.parts = width, every, 2 if overlapping else 1
        self.value = Linear(d_model, self.parts * width, bias=False)
        self.gate = Linear(d_model, self.parts * width, bias=False) if self.span > 1 else None
        self.place = nn.Parameter(torch.empty(every, self.parts * width)) if places else None

    @property
    def span(self) -> int:
        """Tokens that a mean is over."""
        return self.parts * self.every

    @property
    def projected(self) -> int:
        """Numbers that windows need of a token."""
        return self.parts * self.width * (1 if self.gate is None else 2)

    def project(self, x: Tensor) -> Tensor:
        """Tokens [B,T,D] → what their windows need of them, [B,T,projected]."""
        x = x.detach() if self.apart else x
        return self.value(x) if self.gate is None else torch.cat((self.value(x), self.gate(x)), -1)

    def forward(self, projected: Tensor, index: Tensor, number: Tensor) -> Tensor:
        """Means [B,n,W] of windows.

        Args:
            projected: [B,S,projected], what ``project`` gave for tokens in a run
            index: [B,n], where in them the windows close. What lies before the first is left out
            number: [B,n], of the windows in their documents
        """
        if self.gate is None:
            return projected.gather(1, index[..., None].expand(-1, -1, self.width))
        places = index[..., None] - torch.arange(self.span - 1, -1, -1, device=index.device)
        there = places >= 0
        if self.parts == 2:  # nothing before the first window
            there = there & ((number > 0)[..., None] | (torch.arange(self.span, device=index.device) >= self.every))
        values, gates = projected.chunk(2, -1)
        u, z = self._gathered(values, places), self._gathered(gates, places)
        z = at_least_fp32(z)
        z = z if self.place is None else z + torch.cat(self.place.chunk(self.parts, -1))
        weights = z.masked_fill(~there[..., None], float("-inf")).softmax(2)
        return (u * weights.to(u.dtype)).sum(2)

    def _gathered(self, channels: Tensor, places: Tensor) -> Tensor:
        """Of tokens' channels [B,S,parts·W] those of each window, [B,n,span,W]."""
        rows = torch.arange(len(channels), device=channels.device)[:, None, None]
        found = [
            part[rows, at.clamp(min=0)]
            for part, at in zip(channels.split(self.width, -1), places.split(self.every, -1), strict=True)
        ]
        return torch.cat(found, 2) if len(found) > 1 else found[0]


# The memory of an attention that keeps the last tokens as they are, and means of windows of all of them.


class Means(NamedTuple):
    """What a cache holds of a pool.

    width: of a mean
    projected: width of what an open window needs of a token; 0 where its mean is made of another one
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
        opened = {name: (held.projected,) for name, held in means.items() if held.projected}
        self.open = Ring(batch, span, opened, dtype, device)
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


class Windows(NamedTuple):
    """The windows of some tokens of a pass, and of those before them in a cache.

    every: tokens of a window
    n: windows that may be closed
    before: tokens before the pass
    ends: the tokens at which the new ones close
    passed: [B|1,T], windows that are closed at each token; None without a cache
    segments: [B,T], documents of the tokens; None: each row is one
    """

    every: int
    n: int
    before: int
    ends: Ends
    passed: Tensor | None
    segments: Tensor | None

    @property
    def number(self) -> Tensor:
        """[B|1,n], of each in its document."""
        return self.ends.number if self.passed is None else torch.arange(self.n, device=self.passed.device)[None]

    @property
    def positions(self) -> Tensor:
        """[B|1,n], of the first token of each."""
        return self.number * self.every

    def most(self, rows: slice) -> int:
        """How many of the first windows may be closed to some queries."""
        return min(self.n, -(-(self.before + rows.stop) // self.every))  # the first window may be cut

    def closed(self, rows: slice) -> Tensor:
        """[B|1,t,m]: which of the first m windows are closed to some queries; none of the others is."""
        most = self.most(rows)
        if self.passed is None:
            return _closed(self.ends, rows, self.segments)[..., :most]
        return torch.arange(most, device=self.passed.device) < self.passed[:, rows, None]


def windows_of(every: int, asked: Asked, segments: Tensor | None, cache: WindowedCache | None) -> Windows:
    """The windows of ``every`` tokens of the tokens that ask, after a cache has their keys."""
    T, positions = asked.x.shape[1], asked.positions.expand(len(asked.x), -1)
    if cache is None:
        ends = ends_of(positions, every)
        return Windows(every, ends.at.shape[1], 0, ends, None, segments)
    real = None
    if cache.padding is not None:
        real = torch.arange(cache.length - T, cache.length, device=positions.device) >= cache.padding[:, None]
    passed = (positions + 1) // every
    passed = passed if real is None else passed * real
    return Windows(every, cache.length // every, cache.length - T, ends_of(positions, every, real), passed, None)


Rotate = Callable[[Tensor, Tensor], Tensor]  # heads [B,n,·,W] at positions [B|1,n], in their last dimensions
Losses = dict[str, Tensor]


class Entries(NamedTuple):
    """Means of windows, as keys.

    keys: [B,n,H], rotated
    positions: [B|1,n], of the first token of each window
    seen: some of the queries → [B|1,t,m], which of the first m keys each sees; they see none of the others
    """

    keys: Tensor
    positions: Tensor
    seen: Callable[[slice], Tensor]


@family("compressor", context=("kv_dim", "rope_dim", "latent_dim", "attention_heads"))
class Compressor(Block):
    """Makes one key of every window of tokens of a document, and says which of them each query sees.

    Context: ``kv_dim`` (H, width of a key), ``rope_dim`` (of its last part, which is rotated), ``latent_dim`` (of the
    compressed queries) and ``attention_heads``. Windows are counted from the start of a document; one that is not
    closed has no key.

    Attributes:
        every: tokens of a window
    """

    every: int

    def drawn(self) -> Drawn:
        return Drawn(acts="keys")

    def pools(self) -> dict[str, Pool]:
        """Its pools, by the name under which a cache holds their means; the first gives the keys."""
        raise NotImplementedError

    def finish(self, means: tuple[Tensor, ...], positions: Tensor, rotate: Rotate) -> tuple[Tensor, ...]:
        """Means [B,n,W] of each pool → what is kept of them; positions [B,n] are those of the windows' first tokens."""
        raise NotImplementedError

    def choose(self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor, rotate: Rotate) -> Tensor:
        """Which of the windows that are ``closed`` [B|1,T,n] to each query it sees, [B|1,T,n]; all by default."""
        return closed

    def lends(self) -> str | None:
        """The name of keys of windows that it leaves to layers above; None: it leaves none."""
        return None

    def borrows(self) -> str | None:
        """The name of those that it reads of a layer below; None: it makes its own."""
        return None

    def losses(
        self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor, chosen: Tensor, scale: float, rotate: Rotate
    ) -> Losses:
        """Losses by which it learns to choose, name → scalar, already weighted; none by default."""
        return {}

    def held(self) -> dict[str, Means]:
        """What a cache holds of its pools."""
        return {name: Means(p.width, p.projected, p.span) for name, p in self.pools().items()}

    def forward(self, asked: Asked, given: Pass, cache: WindowedCache | None, scale: float, rotate: Rotate) -> Entries:
        """The keys of the windows that are closed.

        Args:
            asked: the new tokens
            given: as of the attention
            cache: the tokens before, with the keys of the new ones stored; None for none
            scale: of the attention's scores
            rotate: as the attention rotates its keys
        """
        windows = windows_of(self.every, asked, given.segments, cache)
        kept = self.keep(asked, windows, cache, rotate)

        def seen(rows: slice) -> Tensor:
            found = windows.closed(rows)
            some = tuple(means[:, : found.shape[-1]] for means in kept)
            return self.choose(asked.rows(rows), some, found, rotate)

        if given.losses is None or not self.training or not torch.is_grad_enabled():
            return Entries(kept[0], windows.positions, seen)
        every = slice(0, asked.x.shape[1])
        chosen = seen(every)
        some = tuple(means[:, : chosen.shape[-1]] for means in kept)
        given.losses.update(self.losses(asked, some, windows.closed(every), chosen, scale, rotate))
        return Entries(kept[0], windows.positions, lambda rows: chosen[:, rows])

    def keep(self, asked: Asked, windows: Windows, cache: WindowedCache | None, rotate: Rotate) -> tuple[Tensor, ...]:
        """What is kept of all windows, [B,n,·] each, those of a cache included."""
        ends, pools = windows.ends, self.pools().values()
        projected = tuple(pool.project(asked.x) for pool in pools)
        opened = projected if cache is None else cache.opened(*projected)
        index = ends.at + opened[0].shape[1] - asked.x.shape[1]
        means = tuple(pool(p, index, ends.number) for pool, p in zip(pools, opened, strict=True))
        kept = self.finish(means, ends.number * self.every, rotate)
        return kept if cache is None else cache.close(ends, *kept)


def _closed(ends: Ends, rows: slice, segments: Tensor | None) -> Tensor:
    """[B,t,n]: the windows that close at a query or before, in its document."""
    at = ends.at[:, None]
    closed = (at <= torch.arange(rows.start, rows.stop, device=at.device)[:, None]) & ends.real[:, None]
    if segments is None:
        return closed
    return closed & (segments.gather(1, ends.at)[:, None] == segments[:, rows, None])
