"""A cache of fixed size: what a recurrent mixer makes of all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache


class State(Cache):
    """The memory of a recurrent mixer: tensors of fixed size, whatever the number of tokens.

    It never fills up, and is never quantised: its errors would add up over the tokens.

    Args:
        batch: rows
        length: ignored
        parts: name → shape for one row and dtype
        device: of the tensors, which start as zeros
    """

    overwrites = True
    quantises = False
    fills = False

    def __init__(
        self, batch: int, length: int, parts: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device
    ) -> None:
        super().__init__(batch, length, {}, torch.float32, device)
        self.held = {
            name: torch.zeros(batch, *shape, dtype=dtype, device=device) for name, (shape, dtype) in parts.items()
        }

    @property
    def buffers(self) -> dict[str, Tensor]:
        return self.held

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self.held = {name: values[rows] for name, values in self.held.items()}

    def without_padding(self, x: Tensor) -> Tensor:
        """The next T tokens x [B,T,…] with zeros in place of padding."""
        if self.padding is None:
            return x
        tokens = torch.arange(self.length, self.length + x.shape[1], device=x.device) >= self.padding[:, None]
        return x * tokens.view(*tokens.shape, *[1] * (x.ndim - 2)).to(x.dtype)

    def advance(self, n_new: int, parts: Mapping[str, Tensor]) -> None:
        """Replace the parts by those after ``n_new`` more tokens."""
        self.length += n_new
        for name, values in parts.items():
            self.held[name].copy_(values)
