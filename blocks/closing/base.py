"""The contract of ``closing``: how residual streams become one after the last layer. A child of ``residual``."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.registry import family


@family("closing", context=("n_streams",))
class Closing(Block):
    """Turns the streams into the input of the final norm. Context: ``n_streams``, M.

    Every layer's residual has one, and only the last layer's is used: one with parameters has them there alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Streams [B,T,M,D] → [B,T,D]."""
        raise NotImplementedError
