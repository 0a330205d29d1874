"""The contract of ``norm``: bring activations to a common scale."""

from __future__ import annotations

from torch import Tensor

from blocks.base import Block
from registry import family


@family("norm", context=("dim",))
class Norm(Block):
    """Normalises the last dimension. ``dim``, its width, is supplied by whoever owns the norm."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] → [..., dim], same dtype."""
        raise NotImplementedError
