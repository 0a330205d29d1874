"""The contract of ``tiling``: which tiles an image is cut into, and how their features become a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block, Placement
from blockwright.registry import family


class Grid(NamedTuple):
    """Tiles of an image: columns × rows."""

    columns: int
    rows: int


ONE = Grid(1, 1)


@family("tiling", context=("tile", "side"), in_layers=False)
class Tiling(Block):
    """Both halves in one block, so that data and model cannot disagree: the data cuts each canvas of ``canvases`` and
    repeats the image token ``count`` times; the model makes as many embeddings.

    Attributes:
        side: s, features a side of a tile
    """

    catalogue_example: ClassVar[Any] = "grid_2d"

    counted_as: ClassVar[str | None] = "image_marks"

    side: int

    def grid(self, width: int, height: int, n_images: int = 1) -> Grid:
        """The grid of an image of these pixels, one of ``n_images`` in its conversation."""
        return ONE

    def canvases(self, grid: Grid) -> list[Grid]:
        """Canvases that the image is fitted on, in tiles; each is cut row by row, and all tiles follow each other."""
        return [ONE]

    def n_tiles(self, grid: Grid) -> int:
        """Tiles of an image."""
        return sum(c * r for c, r in self.canvases(grid))

    def count(self, grid: Grid) -> int:
        """Embeddings of an image."""
        raise NotImplementedError

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features of all tiles [N,s,s,D], and the grid of each image → embeddings [Σ,D], image after image.

        Without images there is one blank tile and nothing is embedded, but every parameter gets a gradient of zeros: a
        process without images in a step does what the others do.
        """
        if not grids:
            return self.sequence(features[:1], ONE)[:0] if len(features) else features.flatten(0, 2)
        parts = features.split([self.n_tiles(Grid(*grid)) for grid in grids])
        return torch.cat([self.sequence(part, Grid(*grid)) for part, grid in zip(parts, grids, strict=True)])

    def sequence(self, features: Tensor, grid: Grid) -> Tensor:
        """Features [n,s,s,D] of one image's tiles → [count,D]."""
        raise NotImplementedError


class Mark(Block):
    """A learned embedding between those of an image."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))

    def reset_parameters(self) -> None:
        self.weight.normal_(0.0, len(self.weight) ** -0.5)

    def forward(self) -> Tensor:
        """[D]."""
        return self.weight

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": "replicate"}

    def close(self, picture: Tensor) -> Tensor:
        """Features [h,w,D] → [h(w+1),D], row by row, the mark after each row."""
        return torch.cat((picture, self().expand(len(picture), 1, -1)), 1).flatten(0, 1)
