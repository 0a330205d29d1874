"""The contract of ``norm``: normalise activations."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.registry import family


@family("norm", context=("dim",))
class Norm(Block):
    """Normalises the last dimension, of width ``dim``, which the norm's owner supplies."""

    counted_as: ClassVar[str | None] = "norms"

    def drawn(self) -> Drawn:
        return Drawn(hides=("eps",))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] → [..., dim], same dtype."""
        raise NotImplementedError
