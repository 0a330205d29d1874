"""A cache of a window: the last tokens only."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.kernels.quantise import Codes


class Ring(Cache):
    """A cache of the last ``length`` tokens, for a window of that many: a new token overwrites the oldest.

    It never fills up. For one new token ``append`` returns the buffers as stored, not in time order, which does not
    matter to attention; ``indices`` gives the order. Several tokens are returned in order, with the window before them.
    """

    overwrites = True
    fills = False
    _answered: int | None = 0  # number of tokens last returned, in time order; None: buffers as stored
    _after: list[dict[str, Tensor]] | None = None  # of the last mark, to be filled

    def append(self, *new: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
        """Store T more tokens.

        Args:
            new: [B,T,…] for each slot, in the order of ``slots``
            multiple: ignored; a ring's lengths soon repeat

        Returns:
            [B,S,…] for each slot: for T = 1 the tokens held, including the new one; else the new tokens, preceded by
            those the first of them sees, S ≤ T + length − 1
        """
        n_new = new[0].shape[1]
        if n_new == 1:
            return self.read(self._push(*new))
        if self._after is not None:
            self._after += self._noted(new)
        start, self.length = self.length, self.length + n_new
        n_before = min(start, self.room - 1)  # what the first of the new tokens sees
        self._answered = n_before + n_new
        before = torch.arange(start - n_before, start, device=new[0].device) % self.room
        kept = torch.arange(max(start, self.length - self.room), self.length, device=new[0].device) % self.room
        seen = []
        for store, values in zip(self.stores.values(), new, strict=True):
            seen.append(torch.cat((store.read(before), store.rounded(values)), 1))
            store.write(kept, values[:, -len(kept) :])
        return tuple(seen)

    def gives_codes(self, n_new: int) -> bool:
        return n_new == 1 and not self.spread and self._stores_as(Ring)

    def append_codes(self, *new: Tensor) -> tuple[Codes, ...]:
        return self._coded(self._push(*new))

    def _push(self, *new: Tensor) -> slice:
        """Store one token → the slots that it sees."""
        if self._after is not None:
            self._after += self._noted(new)
        self._answered, slot = None, self.length % self.room
        self.length += 1
        for store, values in zip(self.stores.values(), new, strict=True):
            store.write(slice(slot, slot + 1), values)
        return slice(0, min(self.length, self.room))

    def _noted(self, new: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What each of some new tokens leaves in the buffers."""
        stores = zip(self.stores.items(), new, strict=True)
        left = {name + suffix: t for (name, store), values in stores for suffix, t in store.coded(values).items()}
        return [{name: t[:, i] for name, t in left.items()} for i in range(new[0].shape[1])]

    def _put(self, row: int, other: Cache, source: int, n: int) -> None:
        last = range(-min(n, self.room), 0)
        slots, theirs = [(self.length + i) % self.room for i in last], [(other.length + i) % other.room for i in last]
        for held, values in zip(self.buffers.values(), other.buffers.values(), strict=True):
            held[row, slots] = values[source, theirs]

    def _shift(self, by: int) -> None:
        for held in self.buffers.values():
            held.copy_(held.roll(by, 1))

    def mark(self, ahead: int | None = None) -> Mark:
        n = self.room if ahead is None else min(ahead, self.room)
        slots = [(self.length + i) % self.room for i in range(n)]
        held = {name: values[:, slots] for name, values in self.buffers.items()}
        self._after = None if ahead is None else []
        return Mark(self.length, ahead, held, [] if self._after is None else self._after)

    def _restore(self, mark: Mark, kept: Sequence[int]) -> None:
        self._after = None
        del mark.after[max(kept) :]
        for name, values in self.buffers.items():
            slots = [(mark.length + i) % self.room for i in range(mark.held[name].shape[1])]
            values[:, slots] = mark.held[name]
        for i, token in enumerate(mark.after):
            rows = slice(None) if len(kept) == 1 else [row for row, n in enumerate(kept) if n > i]
            for name, values in token.items():
                self.buffers[name][rows, (mark.length + i) % self.room] = values[rows]

    def _delay(self, rows: list[int], by: int) -> None:
        for held in self.buffers.values():
            held[rows] = held[rows].roll(by, 1)

    def alike(self) -> Hashable | None:
        return (self.length, self.room, self._answered) if self._hides_as(Ring) else None

    def indices(self, device: torch.device) -> Tensor:
        if self._answered is not None:
            return torch.arange(self.length - self._answered, self.length, device=device)
        last = self.length - 1
        slots = torch.arange(min(self.length, self.room), device=device)
        return last - (last - slots) % self.room
