"""The memory of a layer: what its attention remembers, and the tails of its convolutions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.cache.state import State
from blockwright.blocks.depthwise import Stretch, stretch
from blockwright.blocks.tails import Tails


class HeldTails(State, Tails):
    """The last inputs of each convolution of a layer.

    Args:
        batch, length, device: as of ``State``
        parts: place → (past, W) and dtype
    """

    def __init__(
        self, batch: int, length: int, parts: Mapping[str, tuple[tuple[int, int], torch.dtype]], device: torch.device
    ) -> None:
        super().__init__(batch, length, parts, device)
        self._new: dict[str, Tensor] = {}  # of the pass under way

    def before(self, place: str, u: Tensor, past: int) -> list[Stretch]:
        whole = stretch(self.without_padding(u), past, None, self.held[place])
        if self.notes_each:
            self._new[place] = whole.inputs[:, 1:].unfold(1, past, 1).transpose(2, 3)
        else:
            self._new[place] = whole.inputs[:, u.shape[1] :]
        return [whole]

    def end(self, n_new: int) -> None:
        """Remember what the pass over ``n_new`` tokens has left."""
        new, self._new = self._new, {}
        self.advance(n_new, new)


class LayerCache(Cache):
    """The cache of an attention and the tails of a layer as one cache, which rows, drafts and prompts move together.

    Args:
        attention: what the attention's ``new_cache`` makes
        tails: of the layer's convolutions
    """

    overwrites = True
    spread = False

    def __init__(self, attention: Cache, tails: HeldTails) -> None:
        self.attention, self.tails = attention, tails
        self.room, self.stores = attention.room, {}

    @property
    def quantises(self) -> bool:  # type: ignore[override]
        return self.attention.quantises

    @property
    def fills(self) -> bool:  # type: ignore[override]
        return self.attention.fills

    @property
    def declared(self) -> int | None:
        return self.attention.declared

    @declared.setter
    def declared(self, tokens: int | None) -> None:
        self.attention.declared = tokens

    @property
    def length(self) -> int:
        return self.attention.length

    @length.setter
    def length(self, tokens: int) -> None:
        self.attention.length = self.tails.length = tokens

    @property
    def padding(self) -> Tensor | None:
        return self.attention.padding

    @padding.setter
    def padding(self, tokens: Tensor | None) -> None:
        self.attention.padding = self.tails.padding = tokens

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {**self.attention.buffers, **self.tails.buffers}

    def take(self, rows: Tensor) -> None:
        self.attention.take(rows)
        self.tails.take(rows)

    def take_over(self, smaller: Cache) -> None:
        assert isinstance(smaller, LayerCache)
        self.attention.take_over(smaller.attention)
        self.tails.take_over(smaller.tails)

    def use(self, rows: int) -> None:
        self.attention.use(rows)
        self.tails.use(rows)

    def _put(self, row: int, other: Cache, source: int, n: int) -> None:
        assert isinstance(other, LayerCache)
        self.attention.put(row, other.attention, source)
        self.tails.put(row, other.tails, source)

    def move(self, source: int, target: int) -> None:
        self.attention.move(source, target)
        self.tails.move(source, target)

    def clear(self, row: int) -> None:
        self.attention.clear(row)
        self.tails.clear(row)

    def shift(self, by: int) -> None:
        self.attention.shift(by)
        self.tails.shift(by)

    def mark(self, ahead: int | None = None) -> Mark:
        return Mark(self.length, ahead, {}, [], (self.attention.mark(ahead), self.tails.mark(ahead)))

    def rewind(self, mark: Mark, keep: int | Tensor = 0) -> None:
        for part, of_part in zip((self.attention, self.tails), mark.parts, strict=True):
            part.rewind(of_part, keep)
