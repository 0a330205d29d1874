"""What is added to scores before the softmax: a position's bias, and −∞ on padding, on other documents, and on keys
that a selector leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.base import Keys, Queries
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Carry, Pass
from blockwright.blocks.kernels.attention import visible
from blockwright.blocks.kernels.long_attention import Bias as PartBias
from blockwright.blocks.kernels.scoring import Bias, dense, is_real
from blockwright.blocks.position.base import Position
from blockwright.blocks.selector.base import Asked, Held, Selector
from blockwright.registry import BlockError

CHOSEN = "chosen"  # what a selector leaves to layers above, [B,T,N|1,S]


def score_bias(position: Position, queries: Queries, given: Pass, noted: tuple[Tensor, ...] = ()) -> Tensor | None:
    """Additive score bias [B|1,N|1,T,S]: the position's bias, and −∞ on a cache's padding and on other documents of a
    cache that has several; None if there is nothing.

    The keys are those that the last ``append`` to the cache gave, or without one those of the queries' tokens.

    Args:
        noted: [B,S,…] of the keys, for each of the position's ``slots``

    Raises:
        BlockError: the position has slots, and nothing is noted
    """
    return dense(_padded(_position_bias(position, queries, given, noted), padding_bias(given)))


def score_terms(
    position: Position, queries: Queries, given: Pass, noted: tuple[Tensor, ...] = ()
) -> tuple[Bias, Tensor | None]:
    """``bias`` and ``segments`` of a ``Scoring``: those of ``score_bias``, but a cache's documents are not in the bias,
    and a formula stays what it is: a tensor of either is as large as all scores."""
    bias = _position_bias(position, queries, given, noted)
    documents = given.segments if given.cache is None else given.cache.segments()
    return (bias if given.cache is None or documents is not None else _padded(bias, padding_bias(given))), documents


def padding_bias(given: Pass) -> Tensor | None:
    """``Cache.padding_bias`` of the tokens of a pass, made once for all layers whose caches hold the same tokens."""
    cache, T = given.cache, given.positions.shape[1]
    if cache is None or cache.padding is None or cache.alike() is None:
        return None if cache is None else cache.padding_bias(T)
    return given.once(("padding", T, cache.alike()), lambda: cache.padding_bias(T))


def _padded(bias: Bias, padding: Tensor | None) -> Bias:
    if padding is None:
        return bias
    found = dense(bias)
    return padding if found is None else found + padding


def _position_bias(position: Position, queries: Queries, given: Pass, noted: tuple[Tensor, ...]) -> Bias:
    if type(position).bias is Position.bias:  # positions as many as the keys are made for one alone
        return None
    if len(noted) != len(position.slots()):
        rule = "reads what it notes of each key, and this attention keeps no notes of its position"
        raise BlockError("position", type(position).__name__, rule, "Use an attention of Scored, as gqa and mla are")
    cache, places = given.cache, given.positions
    if cache is None:
        return position.bias(queries, Keys(places, torch.arange(places.shape[1], device=places.device), noted))
    return position.bias(queries, Keys(cache.positions(places.device), cache.indices(places.device), noted))


def position_bias(position: Position, queries: Queries, cache: Cache) -> PartBias | None:
    """``score_bias`` as a function of some of the new tokens, which are stored, and of some of all tokens."""
    shifts, T, device = type(position).bias is not Position.bias, queries.q.shape[1], queries.q.device
    if not shifts and cache.padding is None:
        return None
    indices, places = cache.indices(device), cache.positions(device)

    def bias(rows: slice, keys: slice) -> Tensor | None:
        own = dense(position.bias(queries.rows(rows), Keys(places[:, keys], indices[keys]))) if shifts else None
        if cache.padding is None:
            return own
        hidden = cache.hide_padding(indices[-T:][rows], indices[keys])
        return hidden if own is None else own + hidden

    return bias


class Selection(NamedTuple):
    """What a selector is asked, and of what: ``asked``, and as in ``Held``. The pass's cache has the new tokens; its
    losses are filled with those of a selector that learns; its ``carry`` has what the nearest layer below chose, and is
    left with what this one does."""

    selector: Selector
    asked: Asked
    stored: Tensor
    expand: Callable[[Tensor], Tensor]
    slots: tuple[Tensor, ...]
    segments: Tensor | None
    given: Pass

    def __call__(self, bias: Bias, scale: float) -> Bias:
        """The bias of scores with −∞ on keys that are not chosen; as it is where all are."""
        selector, asked, given = self.selector, self.asked, self.given
        cache, carry, losses = given.cache, given.carry, given.losses
        learns = losses is not None and selector.training and torch.is_grad_enabled()
        takes_all, spread = selector.takes_all(self.stored.shape[1]), cache is not None and cache.spread
        if takes_all and not (learns or spread):
            _leave(carry, None, 0)
            return bias
        held = self.held()
        chosen = None if takes_all else selector(asked, held)
        if losses is not None and learns:
            if self.segments is not None:
                asked = asked._replace(real=is_real(self.segments[:, -asked.x.shape[1] :]))
            losses |= selector.losses(asked, held, chosen, scale, dense(bias))
        if cache is not None and spread and not selector.reuses:  # parts of a sequence are joined, and so alike
            heads = asked.q.shape[2] if selector.per_head else 1
            left = held.seen[:, None] if chosen is None else chosen
            _leave(carry, left.expand(len(asked.q), heads, -1, -1), cache.room)
        elif not selector.reuses:
            _leave(carry, chosen, 0)
        if chosen is None:
            return bias
        found = dense(bias)
        if found is None:
            found = torch.zeros((), dtype=asked.q.dtype, device=asked.q.device).expand(chosen.shape)
        return found.masked_fill(~chosen, float("-inf"))

    def held(self) -> Held:
        T, S, device = self.asked.q.shape[1], self.stored.shape[1], self.stored.device
        cache, carry, segments = self.given.cache, self.given.carry or {}, self.segments
        seen = visible(T, S, device, segments)[:, 0]
        if (padding := padding_bias(self.given)) is not None:
            seen = seen & (padding[:, 0] == 0)
        index = torch.arange(S, device=device)[None]
        if segments is not None:
            others = segments[:, 1:] != segments[:, :-1]
            starts = torch.cat((torch.ones_like(others[:, :1]), others), 1) if S > 1 else segments == segments
            index = index - torch.where(starts, index, 0).cummax(1).values
        elif cache is not None and cache.padding is not None:
            index = index - cache.padding[:, None]
        positions = self.asked.positions if cache is None else cache.positions(device)
        before = carry[CHOSEN][..., :S].transpose(1, 2) if CHOSEN in carry else None
        return Held(self.stored, self.expand, self.slots, positions, index, seen, segments is not None, before)


def _leave(carry: Carry | None, chosen: Tensor | None, width: int) -> None:
    """Leave a choice to the layers above, of at least so many keys."""
    if carry is None:
        return
    carry.pop(CHOSEN, None)
    if chosen is not None:
        carry[CHOSEN] = F.pad(chosen, (0, max(0, width - chosen.shape[-1]))).transpose(1, 2)
