"""The contract of ``compressor``: means of windows of tokens, which an attention sees beside the last tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn

from blockwright.blocks.base import Block, Drawn, Kind
from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.cache.ring import Ring
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.selector.base import Asked, Held
from blockwright.blocks.selector.dsa import Candidates, Indexer, relu_scores
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, Positive

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


def ends_of(positions: Tensor, every: int) -> Ends:
    """The tokens at positions [B,T] that are the last of a window of ``every`` tokens of their document.

    n is the most that T tokens in one run can have; it does not depend on the numbers, so that nothing waits for them.
    """
    last = (positions + 1) % every == 0
    n = -(-positions.shape[1] // every)
    index = last.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
    real, still_open = last.gather(1, index), (positions[:, -1:] + 1) // every
    return Ends(index, torch.where(real, positions.gather(1, index) // every, still_open), real)


class Pool(nn.Module):
    """The mean of a window's tokens, weighted in each channel by a softmax over the window.

    With u = W_value x, z = W_gate x and a bias b of each place in the window: Σ_j softmax_j(z_j + b_j) ⊙ u_j. One that
    overlaps has channels twice: window w is the mean of the first ones over window w − 1 and of the second ones over
    window w.

    Args:
        d_model: D
        width: W of the mean
        every: tokens of a window
        overlapping: whether the mean is over the window before as well
        apart: whether nothing that it reads follows its gradient
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"place": "table"}

    def __init__(self, d_model: int, width: int, every: int, overlapping: bool, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.width, self.every, self.parts = width, every, 2 if overlapping else 1
        self.value = Linear(d_model, self.parts * width, bias=False)
        self.gate = Linear(d_model, self.parts * width, bias=False)
        self.place = nn.Parameter(torch.empty(every, self.parts * width))

    @property
    def span(self) -> int:
        """Tokens that a mean is over."""
        return self.parts * self.every

    def project(self, x: Tensor) -> Tensor:
        """Tokens [B,T,D] → what their windows need of them, [B,T,2·parts·W]."""
        x = x.detach() if self.apart else x
        return torch.cat((self.value(x), self.gate(x)), -1)

    def forward(self, projected: Tensor, index: Tensor, number: Tensor) -> Tensor:
        """Means [B,n,W] of windows.

        Args:
            projected: [B,S,2·parts·W], what ``project`` gave for tokens in a run
            index: [B,n], where in them the windows close. What lies before the first is left out
            number: [B,n], of the windows in their documents
        """
        places = index[..., None] - torch.arange(self.span - 1, -1, -1, device=index.device)
        there = places >= 0
        if self.parts == 2:  # nothing before the first window
            there = there & ((number > 0)[..., None] | (torch.arange(self.span, device=index.device) >= self.every))
        values, gates = projected.chunk(2, -1)
        u, z = self._gathered(values, places), self._gathered(gates, places)
        bias = torch.cat(self.place.chunk(self.parts, -1)) if self.parts == 2 else self.place
        weights = (at_least_fp32(z) + bias).masked_fill(~there[..., None], float("-inf")).softmax(2)
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

    def losses(
        self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor, chosen: Tensor, scale: float, rotate: Rotate
    ) -> Losses:
        """Losses by which it learns to choose, name → scalar, already weighted; none by default."""
        return {}

    def held(self) -> dict[str, Means]:
        """What a cache holds of its pools."""
        return {name: Means(p.width, 2 * p.parts * p.width, p.span) for name, p in self.pools().items()}

    def forward(
        self,
        asked: Asked,
        segments: Tensor | None,
        cache: WindowedCache | None,
        scale: float,
        rotate: Rotate,
        losses: Losses | None = None,
    ) -> Entries:
        """The keys of the windows that are closed.

        Args:
            asked: the new tokens
            segments: [B,T] their documents; None: each row is one
            cache: the tokens before, with the keys of the new ones stored; None for none
            scale: of the attention's scores
            rotate: as the attention rotates its keys
            losses: to be filled in training; None: it does not learn
        """
        T, pools = asked.x.shape[1], self.pools().values()
        ends = ends_of(asked.positions.expand(len(asked.x), -1), self.every)
        projected = tuple(pool.project(asked.x) for pool in pools)
        opened = projected if cache is None else cache.opened(*projected)
        index = ends.at + opened[0].shape[1] - T
        means = tuple(pool(p, index, ends.number) for pool, p in zip(pools, opened, strict=True))
        kept = self.finish(means, ends.number * self.every, rotate)
        kept = kept if cache is None else cache.close(ends, *kept)
        before = 0 if cache is None else cache.length - T

        def closed(rows: slice) -> Tensor:
            most = min(kept[0].shape[1], -(-(before + rows.stop) // self.every))  # the first window may be cut
            if cache is None:
                return _closed(ends, rows, segments)[..., :most]
            return torch.arange(most, device=index.device) < (asked.positions[:, rows, None] + 1) // self.every

        def seen(rows: slice) -> Tensor:
            found = closed(rows)
            some = tuple(means[:, : found.shape[-1]] for means in kept)
            return self.choose(asked.rows(rows), some, found, rotate)

        every = torch.arange(kept[0].shape[1], device=index.device)[None] * self.every
        first = ends.number * self.every if cache is None else every
        if losses is None or not self.training or not torch.is_grad_enabled():
            return Entries(kept[0], first, seen)
        all_of_them = slice(0, T)
        chosen = seen(all_of_them)
        some = tuple(means[:, : chosen.shape[-1]] for means in kept)
        losses |= self.losses(asked, some, closed(all_of_them), chosen, scale, rotate)
        return Entries(kept[0], first, lambda rows: chosen[:, rows])


def _closed(ends: Ends, rows: slice, segments: Tensor | None) -> Tensor:
    """[B,t,n]: the windows that close at a query or before, in its document."""
    at = ends.at[:, None]
    closed = (at <= torch.arange(rows.start, rows.stop, device=at.device)[:, None]) & ends.real[:, None]
    if segments is None:
        return closed
    return closed & (segments.gather(1, ends.at)[:, None] == segments[:, rows, None])


@register("compressor", "csa")
class CSA(Compressor):
    """Compressed sparse attention: one key of each 4 tokens, of which every query sees the highest that an index finds.

    DeepSeek-AI 2026 (DeepSeek-V4), §2.3.1. Keys are made as in ``hca``, but with two values and gates of a token: the
    key of window w is over the first ones of window w − 1 and the second ones of window w. The index has keys of its
    own, I wide, made alike of the same windows, and scores them as ``dsa`` does: with J index heads and the attention's
    compressed query c, q_j = rot(W_q,j c), w = W_w x / √J, I_tw = Σ_j w_tj relu(q_tj · k_w) / √I.

    How V4's index was trained is not published; here it learns as ``dsa`` does, from the attention's weights on the
    windows, and nothing else follows its loss. Equal scores go to the later window, where other implementations leave
    it to the sort. Scores are fp32.

    Args:
        norm: norm of the means that become keys
        index_norm: norm of the index's own
        every: tokens of a window
        n_heads: J, index heads
        head_dim: I, width of an index head
        top_k: windows that a query sees
        dense: whether every query sees all windows, while the index learns
        loss_weight: weight of the index's loss
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"every": 2, "n_heads": 2, "head_dim": 8, "top_k": 2}

    def __init__(
        self,
        d_model: int,
        kv_dim: int,
        rope_dim: int,
        latent_dim: int,
        attention_heads: int,
        norm: Norm,
        index_norm: Norm,
        every: Annotated[int, Ge(2)] = 4,
        n_heads: Count = 64,
        head_dim: Count = 128,
        top_k: Count = 512,
        dense: bool = False,
        loss_weight: Positive = 1.0,
    ) -> None:
        super().__init__()
        if head_dim < rope_dim:
            rule = f"is narrower than the part that the attention rotates ({rope_dim})"
            raise BlockError("head_dim", head_dim, rule, f"Write at least {rope_dim}, or lower rope_head_dim")
        self.every, self.norm, self.index_norm = every, norm, index_norm
        self.pool = Pool(d_model, kv_dim, every, overlapping=True)
        self.index_pool = Pool(d_model, head_dim, every, overlapping=True, apart=True)
        self.index = Index(d_model, latent_dim, attention_heads, n_heads, head_dim, top_k, dense, loss_weight)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["kv_dim" if child == "norm" else "head_dim"]}

    def pools(self) -> dict[str, Pool]:
        return {"key": self.pool, "index": self.index_pool}

    def finish(self, means: tuple[Tensor, ...], positions: Tensor, rotate: Rotate) -> tuple[Tensor, ...]:
        normed = self.norm(means[0]), self.index_norm(means[1])
        return tuple(rotate(keys[:, :, None], positions)[:, :, 0] for keys in normed)

    def choose(self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor, rotate: Rotate) -> Tensor:
        if self.index.takes_all(kept[0].shape[1]):
            return closed
        return self.index(asked._replace(rotate=rotate), _held(kept, closed))[:, 0]

    def losses(
        self, asked: Asked, kept: tuple[Tensor, ...], closed: Tensor, chosen: Tensor, scale: float, rotate: Rotate
    ) -> Losses:
        held = _held((kept[0].detach(), kept[1]), closed)
        return self.index.losses(asked._replace(rotate=rotate), held, chosen[:, None], scale, None)


class Index(Indexer):
    """What chooses windows; arguments as in ``CSA``."""

    def __init__(
        self,
        d_model: int,
        latent_dim: int,
        attention_heads: int,
        n_heads: int,
        head_dim: int,
        top_k: int,
        dense: bool,
        loss_weight: float,
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.attention_heads = n_heads, head_dim, attention_heads
        self.top_k, self.dense, self.loss_weight = top_k, dense, loss_weight
        self.query = Linear(latent_dim, n_heads * head_dim, bias=False)
        self.weights = Linear(d_model, n_heads, bias=False)

    def candidates(self, asked: Asked, held: Held) -> Candidates:
        return Candidates(held.slots[0])

    def scores(self, asked: Asked, keys: Tensor) -> Tensor:
        assert asked.rotate is not None
        q = asked.rotate(self.query(asked.latent).unflatten(-1, (self.n_heads, -1)), asked.positions)
        return relu_scores(q, keys, at_least_fp32(self.weights(asked.x)) * self.n_heads**-0.5)


def _held(kept: tuple[Tensor, ...], seen: Tensor) -> Held:
    """Windows as what can be chosen: keys [B,n,H] and index keys [B,n,I]."""
    keys, index = kept
    none = torch.zeros(1, keys.shape[1], dtype=torch.long, device=keys.device)
    return Held(keys, lambda stored: stored[:, :, None], (index,), none, none, seen, segments=False)


@register("compressor", "hca")
class HCA(Compressor):
    """Heavily compressed attention: one key of each 128 tokens, and every query sees all of them.

    DeepSeek-AI 2026 (DeepSeek-V4), §2.3.2. With u = W_value x, z = W_gate x and biases b of the places in a window:
    key_w = rot(norm(Σ_j softmax_j(z_j + b_j) ⊙ u_j)) over the tokens j of window w, at the position of its first one.

    Args:
        norm: norm of the means
        every: tokens of a window
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"every": 3}

    def __init__(self, d_model: int, kv_dim: int, norm: Norm, every: Annotated[int, Ge(2)] = 128) -> None:
        super().__init__()
        self.every, self.norm = every, norm
        self.pool = Pool(d_model, kv_dim, every, overlapping=False)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["kv_dim"]}

    def pools(self) -> dict[str, Pool]:
        return {"key": self.pool}

    def finish(self, means: tuple[Tensor, ...], positions: Tensor, rotate: Rotate) -> tuple[Tensor, ...]:
        return (rotate(self.norm(means[0])[:, :, None], positions)[:, :, 0],)
