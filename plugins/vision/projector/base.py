"""The contract of ``projector``: bring a vision tower's features to the decoder's width."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.registry import family


@family("projector", context=("width", "side"), in_layers=False)
class Projector(Block):
    """Turns S × S features of width W into s × s embeddings of width D.

    Attributes:
        side_out: s
    """

    catalogue_example: ClassVar[Any] = "downsample_mlp"

    counted_as: ClassVar[str | None] = "projector"

    side_out: int

    def forward(self, features: Tensor) -> Tensor:
        """[N,S,S,W] → [N,s,s,D]."""
        raise NotImplementedError
