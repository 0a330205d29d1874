"""What is added to scores before the softmax: a position's bias, and what hides padding and other documents."""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.base import Keys, Queries
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.long_attention import Bias as PartBias
from blockwright.blocks.kernels.long_attention import Read, attention_in_parts, suits
from blockwright.blocks.kernels.scoring import Bias, dense
from blockwright.blocks.position.base import Position
from blockwright.registry import BlockError


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
    if given.cache is None:
        return bias, given.segments
    documents = given.cache.segments()
    return (bias if documents is not None else _padded(bias, padding_bias(given))), documents


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
    if not _shifts(position):
        return None
    if len(noted) != len(position.slots()):
        rule = "reads what it notes of each key, and this attention keeps no notes of its position"
        raise BlockError("position", type(position).__name__, rule, "Use an attention of Scored, as gqa and mla are")
    cache, places = given.cache, given.positions
    if cache is None:
        return position.bias(queries, Keys(places, torch.arange(places.shape[1], device=places.device), noted))
    return position.bias(queries, Keys(cache.positions(places.device), cache.indices(places.device), noted))


def _shifts(position: Position) -> bool:
    """Whether it has a bias; positions as many as the keys are made for one alone."""
    return type(position).bias is not Position.bias


def reads_in_parts(kernels: Kernels, cache: Cache, T: int) -> bool:
    """Whether T new tokens should attend to a cache part by part: many on a long past, where the kernel is ours for
    CPUs, and a cache that keeps every token in order."""
    in_order = type(cache).append is Cache.append and type(cache).indices is Cache.indices
    return kernels.attention == "blocked" and in_order and suits(T, cache.length + T)


def attend_in_parts(
    position: Position,
    queries: Queries,
    cache: Cache,
    new: tuple[Tensor, ...],
    scale: float,
    read: Read | None = None,
) -> Tensor:
    """Store T new tokens and attend to a cache part by part, where ``reads_in_parts``.

    Args:
        queries: the new tokens
        new: what the cache stores of them
        scale: multiplies q·k
        read: keys and values of some tokens; default: what is stored

    Returns:
        [B,T,N,V]
    """
    cache.store(*new)
    bias = _part_bias(position, queries, cache)
    return attention_in_parts(queries.q, cache.length, read or cache.read, scale, bias)


def _part_bias(position: Position, queries: Queries, cache: Cache) -> PartBias | None:
    """``score_bias`` as a function of some of the new tokens and some of the stored ones."""
    shifts, T, device = _shifts(position), queries.q.shape[1], queries.q.device
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
