"""Caches that do not grow: of the last tokens, for a window, and what a recurrent mixer makes of all tokens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.kernels.coded_attention import Codes


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


class State(Cache):
    """The memory of a recurrent mixer: tensors of fixed size, whatever the number of tokens.

    It never fills up, and is never quantised: its errors would add up over the tokens.

    Args:
        batch: rows
        length: ignored
        parts: name → shape for one row and dtype
        device: of the tensors, which start as zeros

    Attributes:
        after: since a ``mark`` of tokens ahead, the tensors after each token, to be filled by ``advance``; else None
    """

    overwrites = True
    quantises = False
    fills = False
    after: list[dict[str, Tensor]] | None = None

    def __init__(
        self, batch: int, length: int, parts: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device
    ) -> None:
        super().__init__(batch, length, {}, torch.float32, device)
        self.held = {
            name: torch.zeros(batch, *shape, dtype=dtype, device=device) for name, (shape, dtype) in parts.items()
        }
        self._whole = self.held

    @property
    def buffers(self) -> dict[str, Tensor]:
        return self.held

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self.held = self._whole = {name: values[rows] for name, values in self.held.items()}

    def use(self, rows: int) -> None:
        self.held = {name: values[:rows] for name, values in self._whole.items()}

    def _put(self, row: int, other: Cache, source: int, n: int) -> None:
        for held, theirs in zip(self.buffers.values(), other.buffers.values(), strict=True):
            held[row] = theirs[source]

    def _shift(self, by: int) -> None:
        """Nothing: a state keeps no positions."""

    def mark(self, ahead: int | None = None) -> Mark:
        self.after = None if ahead is None else []
        held = {name: values.clone() for name, values in self.held.items()}
        return Mark(self.length, ahead, held, [] if self.after is None else self.after)

    def _restore(self, mark: Mark, kept: Sequence[int]) -> None:
        self.after = None
        del mark.after[max(kept) :]
        states = [mark.held, *mark.after]
        for n in set(kept):
            rows = slice(None) if len(kept) == 1 else [row for row, own in enumerate(kept) if own == n]
            for name, values in self.held.items():
                values[rows] = states[n][name][rows]

    def _delay(self, rows: list[int], by: int) -> None:
        """As ``_shift``."""

    def without_padding(self, x: Tensor) -> Tensor:
        """The next T tokens x [B,T,…] with zeros in place of padding."""
        if self.padding is None:
            return x
        tokens = torch.arange(self.length, self.length + x.shape[1], device=x.device) >= self.padding[:, None]
        return x * tokens.view(*tokens.shape, *[1] * (x.ndim - 2)).to(x.dtype)

    def tails(self, name: str, inputs: Tensor) -> Tensor:
        """What a part holds after T more inputs, for ``advance``, where it is the last P inputs.

        Args:
            inputs: [B,P+T,…], those that are held first
        """
        past, T = self.held[name].shape[1], inputs.shape[1] - self.held[name].shape[1]
        return inputs[:, 1:].unfold(1, past, 1).movedim(-1, 2) if self.notes_each else inputs[:, T:]

    @property
    def notes_each(self) -> bool:
        """Whether the tensors after each token are needed, for ``rewind`` to keep the first ones."""
        return self.after is not None

    def takes(self, parts: Mapping[str, Tensor], n_new: int) -> bool:
        """Whether parts after ``n_new`` tokens hold all that is noted."""
        return not self.notes_each or n_new == 1 or all(t.ndim > self.held[n].ndim for n, t in parts.items())

    def advance(self, n_new: int, parts: Mapping[str, Tensor]) -> None:
        """Replace the parts by those after ``n_new`` more tokens.

        Args:
            parts: name → what is held after the last token, [B,…]; or after each, [B,T,…]
        """
        self.length += n_new
        each = {
            name: values if values.ndim > self.held[name].ndim else values[:, None] for name, values in parts.items()
        }
        for name, values in each.items():
            self.held[name].copy_(values[:, -1])
        if self.after is not None:
            noted = {n: values.to(self.held[n].dtype, copy=values.ndim == parts[n].ndim) for n, values in each.items()}
            self.after += [{n: values[:, t] for n, values in noted.items()} for t in range(n_new)]
