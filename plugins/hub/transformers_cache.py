"""The caches of a decoder's layers as a cache of ``transformers``, for ``generate`` (extra ``transformers``)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from blockwright.blocks.cache.base import Cache as BlockCache
from blockwright.blocks.decoder import Decoder
from blockwright.registry import BlockError

AHEAD = 256  # tokens of room for each growth of a cache whose final length is unknown


class BlockwrightCache(Cache):
    """The caches of all layers (blocks/cache) behind transformers' interface, made at the first forward pass.

    Args:
        decoder: whose caches they are
        room: tokens of a row that it begins with, padding included; None if unknown. It grows as needed
    """

    def __init__(self, decoder: Decoder, room: int | None = None) -> None:
        super().__init__(layers=[])
        self.decoder, self.room, self.seen = decoder, room, 0
        self.held: list[Any] = []

    def prepare(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> list[Any]:
        """The caches, with room for tokens [B,T] behind those seen.

        Args:
            mask: [B,S] of all of them; None where there is no padding but that of the first call
            positions: [B|1,T] that a caller expects; None for those that the caches count

        Raises:
            BlockError: padding elsewhere than on the left, or other positions
        """
        B, T = tokens.shape[:2]
        needed = self.seen + T
        padding = self._padding(mask, (B, needed))
        _check_positions(positions, self.seen, T, padding)
        if not self.held:
            self.held = self.decoder.new_caches(B, self.room or needed + AHEAD, padding=padding)
        elif any(_fills(c) and c.room < needed for c in self.held):
            room = needed + AHEAD
            self.room = None
            for i, new in enumerate(self.decoder.new_caches(self.batch_size, room)):
                if _fills(self.held[i]):
                    new.take_over(self.held[i])
                    self.held[i] = new
        self.seen = needed
        return self.held

    def _padding(self, mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """[B] padding tokens of each row, which no later call may change."""
        held = self.held[0].padding if self.held else None
        if mask is None:
            return held
        if tuple(mask.shape) != shape:
            remedy = "Give a mask of all tokens, those in the cache included"
            raise BlockError("attention_mask", tuple(mask.shape), f"must be {shape}", remedy)
        padding = _left_padding(mask)
        if self.held and not _equal(padding, held):
            rule = "the padding of a row is that of its first call"
            raise BlockError("attention_mask", "…", rule, "Pad later tokens not at all, or set use_cache=False")
        return padding

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.held[0].buffers.values())))

    def __len__(self) -> int:
        return len(self.decoder.order())

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
            cache.take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same, under the name that other searches use."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue with each row so many times."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockwrightCache:
        """Its own buffers, and the same decoder: a prompt's cache is continued several times from copies."""
        copied = BlockwrightCache(self.decoder, self.room)
        copied.seen, copied.held = self.seen, copy.deepcopy(self.held, memo)
        return copied

    def _refuse(self, *_: Any) -> None:
        rule = "these caches do not forget tokens"
        raise BlockError("cache", type(self).__name__, rule, "Generate without an assistant; or use_cache=False")

    crop = update = _refuse  # type: ignore[assignment]

    @property
    def is_linear(self) -> list[bool]:
        """No layer: generate then leaves out of a continued text what the cache holds."""
        return [False] * len(self)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.held)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _fills(cache: Any) -> bool:
    """Whether it has to grow; a plug-in's cache of another class looks after itself."""
    return isinstance(cache, BlockCache) and cache.fills


def fits_cache(tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> bool:
    """Whether each row of tokens [B,T] is one document from position 0, padded on the left if at all."""
    if mask is not None and mask.shape != tokens.shape:
        return False
    try:
        padding = None if mask is None else _left_padding(mask)
        _check_positions(positions, 0, tokens.shape[1], padding)
    except BlockError:
        return False
    return True


def _left_padding(mask: Tensor) -> Tensor | None:
    """[B] padding tokens before each row of a mask [B,S]; None without any.

    Raises:
        BlockError: there is padding elsewhere
    """
    padding = (mask == 0).sum(1)
    if not (torch.arange(mask.shape[1], device=mask.device) >= padding[:, None]).eq(mask).all():
        rule = "a cache holds rows padded on the left"
        remedy = "Set tokenizer.padding_side='left', or use_cache=False"
        raise BlockError("attention_mask", "…", rule, remedy)
    return padding if padding.any() else None


def _check_positions(positions: Tensor | None, seen: int, T: int, padding: Tensor | None) -> None:
    """Refuse positions [B|1,T] of real tokens that are not those of one document in each row."""
    if positions is None:
        return
    counted = torch.arange(seen, seen + T, device=positions.device)[None]
    counted = counted if padding is None else counted - padding[:, None]
    if ((positions != counted) & (counted >= 0)).any():
        rule = "a cache continues one document in each row, from position 0"
        raise BlockError("position_ids", "…", rule, "Leave them out, or set use_cache=False")
