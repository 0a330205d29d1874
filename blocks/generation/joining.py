"""Which decoders can be computed for rows that join and leave."""

from __future__ import annotations

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
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
        BlockError: an attention keeps no cache, or one of a class that is no ``Cache``
    """
    try:
        caches = decoder.new_caches(rows, room + ahead, bits)
    except NotImplementedError:
        rule = "an attention of this model keeps no cache, which rows could join"
        raise BlockError("attention", None, rule, "Choose another attention, or give it new_cache") from None
    for i, (layer, cache) in enumerate(zip(decoder.layers, caches, strict=True)):
        if not isinstance(cache, Cache):
            rule = f"{type(layer.attention).__name__} keeps a {type(cache).__name__}, which rows cannot join"
            remedy = "Derive it from blockwright.blocks.cache.base.Cache, or generate rows one by one"
            raise BlockError(f"layers.{i}.attention", type(cache).__name__, rule, remedy)
        if ahead:
            cache.declared = room
    return caches
