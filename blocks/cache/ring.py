"""A cache of a window: the last tokens only."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.kernels.quantise import Codes


class Ring(Cache):
    """A cache of the last ``length`` tokens, for a window of that many: a new token overwrites the oldest.

    It never fills up. For one new token ``append`` returns the buffers as stored, not in time order, which does not
    matter to attention; ``indices`` gives the order. Several tokens are returned in order, with the window before them.
    """

    overwrites = True
    fills = False
    _answered: int | None = 0  # number of tokens last returned, in time order; None: buffers as stored

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
            return self.read(self._put(*new))
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
        return self._coded(self._put(*new))

    def _put(self, *new: Tensor) -> slice:
        """Store one token → the slots that it sees."""
        self._answered, slot = None, self.length % self.room
        self.length += 1
        for store, values in zip(self.stores.values(), new, strict=True):
            store.write(slice(slot, slot + 1), values)
        return slice(0, min(self.length, self.room))

    def alike(self) -> Hashable | None:
        return (self.length, self.room, self._answered) if self._hides_as(Ring) else None

    def indices(self, device: torch.device) -> Tensor:
        if self._answered is not None:
            return torch.arange(self.length - self._answered, self.length, device=device)
        last = self.length - 1
        slots = torch.arange(min(self.length, self.room), device=device)
        return last - (last - slots) % self.room
