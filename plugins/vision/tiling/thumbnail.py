from __future__ import annotations

from torch import Tensor

from blockwright.plugins.vision.tiling.base import Grid, Mark, Tiling
from blockwright.registry import register


@register("tiling", "thumbnail")
class Thumbnail(Tiling):
    """The image fitted on one tile, a learned mark after each row of its features: ``grid_2d`` without its tiles."""

    def __init__(self, d_model: int, side: int) -> None:
        super().__init__()
        self.side, self.newline = side, Mark(d_model)

    def count(self, grid: Grid) -> int:
        return self.side * (self.side + 1)

    def sequence(self, features: Tensor, grid: Grid) -> Tensor:
        return self.newline.close(features[0])
