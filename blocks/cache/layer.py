"""The cache of a layer of which several parts remember: its attention, its memory, its convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.depthwise import Stretch, stretch
from blockwright.blocks.forward_pass import Tails
from blockwright.blocks.kernels.machine import device_memory
from blockwright.registry import BlockError


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
    """One cache for each part that remembers, by name; all hold the same tokens.

    Whatever is done to the cache is done to each of them. ``length``, ``room`` and ``declared`` are those of the first.

    Args:
        parts: name → its cache; the first is that of the attention
    """

    overwrites = True

    def __init__(self, parts: Mapping[str, Cache]) -> None:
        self.parts = dict(parts)
        self.stores, self.spread = {}, False
        self.quantises = any(part.quantises for part in self.parts.values())  # type: ignore[misc]
        self.fills = self.first.fills  # type: ignore[misc]

    @property
    def first(self) -> Cache:
        return next(iter(self.parts.values()))

    @property
    def room(self) -> int:  # type: ignore[override]
        return self.first.room

    @property
    def length(self) -> int:
        return self.first.length

    @length.setter
    def length(self, tokens: int) -> None:
        for part in self.parts.values():
            part.length = tokens

    @property
    def padding(self) -> Tensor | None:
        return self.first.padding

    @padding.setter
    def padding(self, tokens: Tensor | None) -> None:
        for part in self.parts.values():
            part.padding = tokens

    @property
    def declared(self) -> int | Tensor | None:
        return self.first.declared

    @declared.setter
    def declared(self, tokens: int | Tensor | None) -> None:
        for part in self.parts.values():
            part.declared = tokens

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {f"{name}.{buffer}": held for name, part in self.parts.items() for buffer, held in part.buffers.items()}

    def take(self, rows: Tensor) -> None:
        for part in self.parts.values():
            part.take(rows)

    def take_over(self, smaller: Cache) -> None:
        assert isinstance(smaller, LayerCache)
        for name, part in self.parts.items():
            if part.fills:
                part.take_over(smaller.parts[name])
            else:
                self.parts[name] = smaller.parts[name]

    def use(self, rows: int) -> None:
        for part in self.parts.values():
            part.use(rows)

    def _put(self, row: int, other: Cache, source: int, n: int) -> None:
        assert isinstance(other, LayerCache)
        for name, part in self.parts.items():
            part._put(row, other.parts[name], source, n)

    def _shift(self, by: int) -> None:
        for part in self.parts.values():
            part._shift(by)

    def mark(self, ahead: int | None = None) -> Mark:
        parts = tuple(part.mark(ahead) for part in self.parts.values())
        return Mark(self.length, ahead, {}, [], parts)

    def rewind(self, mark: Mark, keep: int | Tensor = 0) -> None:
        for part, of_part in zip(self.parts.values(), mark.parts, strict=True):
            part.rewind(of_part, keep)


# --- caches that a machine cannot hold are refused first: a system may end a process that fills them ------------------


MOST = 2**36  # tokens of all rows: no machine holds more, and sizes of many more do not fit 64 bits


def caches_that_fit(
    make: Callable[[torch.device], Sequence[Cache]], rows: int, length: int, device: torch.device
) -> list[Cache]:
    """Caches, after they have been counted on the meta device.

    Args:
        make: makes them on a device
        rows: of each
        length: tokens of a row
        device: that they are for

    Raises:
        BlockError: they take more memory than the device has
    """
    needed = sum(getattr(cache, "nbytes", 0) for cache in make(torch.device("meta"))) if rows * length <= MOST else None
    if needed is None or needed > device_memory(device):
        size = "" if needed is None else f" take {needed / 1e9:,.4g} GB, and they"
        rule = f"caches of {rows:,} × {length:,} tokens{size} are more than the memory of {device.type}"
        raise BlockError("caches", rows * length, rule, "Choose fewer rows, fewer tokens, or fewer bits")
    return list(make(device))
