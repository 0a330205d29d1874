"""What an attention remembers between tokens: named buffers of fixed length, filled from the front.

Left out here: rings for sliding windows and quantised storage; ragged batches (every row has the same length).
"""

from __future__ import annotations

import torch
from torch import Tensor

from registry import BlockError


class Cache:
    """Static buffers, one for each thing remembered a token.

    Args:
        batch: rows
        length: tokens there is room for
        slots: name → shape of what is kept for one token
        dtype, device: of the buffers
    """

    def __init__(
        self, batch: int, length: int, slots: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.room = length
        self.length = 0
        self.buffers = {n: torch.zeros(batch, length, *shape, dtype=dtype, device=device) for n, shape in slots.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, whatever part of it is filled."""
        return sum(b.nbytes for b in self.buffers.values())

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store T more tokens.

        Args:
            new: [B,T,…] for each slot, in the order of ``slots``

        Returns:
            [B,length,…] for each slot: everything stored so far, the new tokens last

        Raises:
            BlockError: there is no room for them
        """
        start, end = self.length, self.length + new[0].shape[1]
        if end > self.room:
            raise BlockError("length", end, f"the cache has room for {self.room} tokens", "Make a longer cache")
        self.length = end
        for buffer, value in zip(self.buffers.values(), new, strict=True):
            buffer[:, start:end] = value
        return tuple(buffer[:, :end] for buffer in self.buffers.values())

    def positions(self, device: torch.device) -> Tensor:
        """[1,length]: the position of each stored token."""
        return torch.arange(self.length, device=device)[None]
