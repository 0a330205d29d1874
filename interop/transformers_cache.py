"""The caches of a decoder's layers as a cache of ``transformers``, for ``generate`` (extra ``transformers``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from blocks.cache import Cache as BlockCache
from blocks.decoder import Decoder
from registry import BlockError

AHEAD = 256  # tokens of room for each growth of a cache whose final length is unknown


class BlockwrightCache(Cache):
    """The caches of all layers (blocks/cache.py) behind transformers' interface, made at the first forward pass.

    Args:
        decoder: whose caches they are
        room: tokens of a row, padding included; None grows as needed
    """

    def __init__(self, decoder: Decoder, room: int | None = None) -> None:
        super().__init__(layers=[])
        self.decoder, self.room, self.seen = decoder, room, 0
        self.held: list[Any] = []

    def prepare(self, tokens: Tensor, mask: Tensor | None) -> list[Any]:
        """The caches, with room for tokens [B,T] behind those seen; ``mask`` [B,S] is of all of them."""
        B, T = tokens.shape[:2]
        needed = self.seen + T
        if not self.held:
            padding = None if mask is None else _left_padding(mask)
            self.held = self.decoder.new_caches(B, self.room or needed + AHEAD, padding=padding)
        elif self.room is None and any(_fills(c) and c.room < needed for c in self.held):
            self._grow(needed + AHEAD)
        self.seen = needed
        return self.held

    def _grow(self, room: int) -> None:
        for i, new in enumerate(self.decoder.new_caches(self.batch_size, room)):
            if _fills(self.held[i]):
                new.take_over(self.held[i])
                self.held[i] = new

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.held[0].buffers.values())))

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.room is None else self.room

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.held, self.seen = [], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with these rows, as beam search does."""
        for cache in self.held:
            for buffer in cache.buffers.values():
                buffer.copy_(buffer.index_select(0, beam_idx))
            if cache.padding is not None:
                cache.padding = cache.padding.index_select(0, beam_idx)

    def _refuse(self, *_: Any) -> None:
        rule = "these caches neither forget tokens nor repeat rows"
        raise BlockError("cache", type(self).__name__, rule, "Generate without an assistant; or use_cache=False")

    crop = batch_repeat_interleave = batch_select_indices = update = _refuse  # type: ignore[assignment]

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.held)


def _fills(cache: Any) -> bool:
    """Whether it has to grow; a plug-in's cache of another class looks after itself."""
    return isinstance(cache, BlockCache) and cache.fills


def _left_padding(mask: Tensor) -> Tensor | None:
    """[B] padding tokens before each row.

    Raises:
        BlockError: there is padding elsewhere
    """
    padding = (mask == 0).sum(1)
    if not padding.any():
        return None
    if not (torch.arange(mask.shape[1], device=mask.device) >= padding[:, None]).eq(mask.bool()).all():
        rule = "a cache holds rows padded on the left"
        raise BlockError("attention_mask", "…", rule, "Set tokenizer.padding_side='left'")
    return padding
