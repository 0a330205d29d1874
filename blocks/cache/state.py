"""A cache of fixed size: what a recurrent mixer makes of all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache, Mark


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
