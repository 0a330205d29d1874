"""Which decoders can be computed for rows that join and leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.layer import LayerCache, caches_that_fit
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.layer import Layer
from blockwright.registry import BlockError


def refuse_dependent_rows(decoder: Decoder) -> None:
    """Refuse a decoder in which a row changes what another gets.

    Raises:
        BlockError
    """
    for name, block in decoder.named_modules():
        if isinstance(block, Block) and not block.independent:
            rule = "what a row gets depends on the other rows, so requests that come and go would change each other"
            raise BlockError(name, type(block).__name__, rule, "Choose another block, or generate rows one by one")


def joinable_caches(decoder: Decoder, rows: int, room: int, bits: int | None, ahead: int = 0) -> list[Cache]:
    """``Decoder.new_caches`` of rows that may join and leave.

    Args:
        ahead: further room, for tokens that are never kept

    Raises:
        BlockError: an attention keeps no cache, or one of a class that is no ``Cache``, or the caches take more memory
            than there is
    """
    layers = [(f"layers.{i}", decoder.layers[i]) for i in decoder.order()]
    return _of_layers(layers, decoder, rows, room, bits, ahead)


def joinable_caches_of_depths(
    decoder: Decoder, depths: int, rows: int, room: int, bits: int | None, ahead: int = 0
) -> list[Cache]:
    """As ``joinable_caches``, of the first depths of multi-token prediction."""
    layers = [(f"mtp.{k}.layer", decoder.get_submodule(f"mtp.{k}.layer")) for k in range(depths)]
    return _of_layers(layers, decoder, rows, room, bits, ahead)


def _of_layers(
    layers: Sequence[tuple[str, nn.Module]], decoder: Decoder, rows: int, room: int, bits: int | None, ahead: int
) -> list[Cache]:
    like = decoder.embedding.weight

    def make(device: torch.device) -> list[Cache]:
        return [_joinable(name, layer, (rows, room + ahead, like.dtype, device, bits)) for name, layer in layers]

    caches = caches_that_fit(make, rows, room + ahead, like.device)
    for cache in caches if ahead else ():
        cache.declared = room
    return caches


def _joinable(name: str, layer: nn.Module, made: tuple[int, int, torch.dtype, torch.device, int | None]) -> Cache:
    place = f"{name}.attention"
    assert isinstance(layer, Layer)
    try:
        cache = layer.new_cache(*made)
    except NotImplementedError:
        rule = "an attention of this model keeps no cache, which rows could join"
        raise BlockError(place, None, rule, "Choose another attention, or give it new_cache") from None
    held = cache.first if isinstance(cache, LayerCache) else cache
    if not isinstance(held, Cache):
        rule = f"{type(layer.attention).__name__} keeps a {type(held).__name__}, which rows cannot join"
        remedy = "Derive it from blockwright.blocks.cache.base.Cache, or generate rows one by one"
        raise BlockError(place, type(held).__name__, rule, remedy)
    return cache
