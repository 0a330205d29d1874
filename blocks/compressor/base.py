"""The contract of ``compressor``: means of windows of tokens, which an attention sees beside the last tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.compressor.cache import Means, WindowedCache
from blockwright.blocks.compressor.pool import Ends, Pool, ends_of
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.selector.base import Asked
from blockwright.registry import family

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
