from __future__ import annotations

from torch import Tensor

from blockwright.plugins.vision.tiling.base import Grid, Tiling
from blockwright.registry import register


@register("tiling", "native")
class Native(Tiling):
    """The image fitted on one tile, its features row by row and nothing else, as in LLaVA-1.5, arXiv 2310.03744."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def count(self, grid: Grid) -> int:
        return self.side * self.side

    def sequence(self, features: Tensor, grid: Grid) -> Tensor:
        return features.flatten(0, 2)
