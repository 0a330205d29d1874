"""Attention to the last tokens and to keys beside them, such as means of windows, in one softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockwright.blocks.attention.sources import Near, Source
from blockwright.blocks.base import Keys, Queries
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compressor import Entries, WindowedCache
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.few_keys import few, pieces
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.registry import BlockError

if TYPE_CHECKING:
    from blockwright.blocks.attention.scored import Scored

Beside = Callable[[], Entries]
ROWS = 256  # queries whose scores are in memory at a time


def attend_beside(block: Scored, given: Pass, queries: Queries, k: Tensor, beside: Beside) -> Tensor:
    """Some queries at a time, each on its window and on those keys beside it that it sees.

    Args:
        block, given: as of ``Scored.attend``
        queries: the tokens
        k: [B,T,1,H] of the tokens, keys and values at once
        beside: asked for the other keys once the tokens' own are remembered

    Returns:
        [B,T,N,H]
    """
    if (held := windowed(given.cache)) is None:
        near = Near(k, given.positions, torch.arange(k.shape[1], device=k.device), given.segments, None)
    else:
        keys, index = held.remember(k)
        places = index[None] if held.padding is None else (index - held.padding[:, None]).clamp(min=0)
        near = Near(keys, places, index, None, held.padding)
    assert block.window is not None
    queries = queries._replace(positions=queries.positions.expand(len(queries.q), -1))
    return _attended(block, queries, near, beside(), block.window)


def _attended(block: Scored, queries: Queries, near: Near, entries: Entries, window: int) -> Tensor:
    """Some queries at a time, each on its window and on all entries: [B,T,N,H]."""
    T, parts = queries.q.shape[1], []
    for start in range(0, T, ROWS):
        rows, own = slice(start, min(start + ROWS, T)), near.before(T, start, min(start + ROWS, T), window)
        some = queries.rows(rows)
        chosen = entries.seen(rows)
        first = slice(0, chosen.shape[-1])
        far = Source(chosen, entries.keys[:, first, None], entries.positions[:, first])
        sources = far, Source(own.seen(rows.stop - start, window), own.keys, own.positions)
        index = few(chosen)
        if index is None:
            parts.append(_on_all(block, some, sources))
        else:
            parts.append(_on_few(block, some, sources, index, window))
    return torch.cat(parts, 1)


def _on_few(block: Scored, queries: Queries, sources: Sequence[Source], index: Tensor, window: int) -> Tensor:
    """Attention of each query to its own keys, gathered: chosen ones by their indices [B|1,t,K], and its window."""
    q, parts = queries.q, []
    (B, t), device = q.shape[:2], q.device
    S, width = sources[1].seen.shape[-1], min(sources[1].seen.shape[-1], window)
    first = torch.arange(S - t - width + 1, S - width + 1, device=device).clamp(min=0)  # up to the query's own key
    last = (first[:, None] + torch.arange(width, device=device))[None]
    a_query = B * (index.shape[-1] + width) * q.shape[-1] * q.element_size()
    for rows in pieces(t, a_query, device):
        own = [
            each.some(rows).taken(at[:, rows].expand(B, -1, -1))
            for each, at in zip(sources, (index, last), strict=True)
        ]
        some = Queries(*(each.flatten(0, 1)[:, None] for each in queries.rows(rows)))
        y = _on_all(block, some, own)
        parts.append(y[:, 0].unflatten(0, (B, -1)))
    return torch.cat(parts, 1)


def _on_all(block: Scored, queries: Queries, sources: Sequence[Source]) -> Tensor:
    """Attention of some queries to all keys of the sources, of which each sees some."""
    seen = torch.cat(_alike(*(each.seen for each in sources)), -1)
    keys = torch.cat([each.keys for each in sources], 1)
    places = torch.cat(_alike(*(each.positions for each in sources)), -1)
    q = queries.q
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))[:, None]
    order = torch.arange(seen.shape[-1], device=q.device)
    far = dense(block.position.bias(queries, Keys(places, order)))
    scoring = Scoring(block.scale, bias if far is None else bias + far)
    if block.scores is None:
        return block.kernels.attend(q, keys, keys, scoring)
    return block.scores(q, keys, keys, scoring, queries.x, ())


def windowed(cache: Cache | None) -> WindowedCache | None:
    """The cache that ``new_cache`` makes.

    Raises:
        BlockError: another one
    """
    if cache is None or isinstance(cache, WindowedCache):
        return cache
    rule = "shared_kv keeps means of windows, which this cache does not hold"
    raise BlockError("cache", type(cache).__name__, rule, "Use the attention's new_cache")


def _alike(*parts: Tensor) -> list[Tensor]:
    """[B|1,…] of each, expanded to the larger number of rows."""
    rows = max(len(part) for part in parts)
    return [part.expand(rows, *part.shape[1:]) for part in parts]
