"""The contract of ``tiling``: which tiles an image is cut into, and how their features become a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from blockwright.blocks.base import Block, Placement
from blockwright.registry import family, register
from blockwright.registry.ranges import Whole


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


@register("tiling", "grid_2d")
class Grid2D(Tiling):
    """A thumbnail of the whole image, and tiles of it at a higher resolution: DeepSeek-VL2, arXiv 2412.10302, §2.

    Of all canvases of at most ``max_tiles`` tiles, the one is taken that shows the most pixels of the image and, among
    equals, wastes the fewest. This is the released code's rule, and LLaVA-NeXT's; the paper's "least padding area"
    picks another for nine images in ten.

    The sequence is the thumbnail, a separator, and the tiles joined to one picture and read row by row across them.
    Each row of either ends with the same newline: s(s + 1) + 1 + r·s(c·s + 1) embeddings. The only tile of a 1×1 image
    is its thumbnail; it is encoded once and used twice, where the released code encodes it twice.

    Args:
        max_tiles: c·r at most; the paper evaluates InfoVQA with 18
        most_images: in a conversation with more, every image is 1×1
        global_view: whether the thumbnail comes first or last
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"max_tiles": 4}

    def __init__(
        self,
        d_model: int,
        tile: int,
        side: int,
        max_tiles: Annotated[int, Ge(1), Le(64)] = 9,
        most_images: Whole = 2,
        global_view: Literal["head", "tail"] = "head",
    ) -> None:
        super().__init__()
        self.tile, self.side, self.most_images, self.global_view = tile, side, most_images, global_view
        tried = range(1, max_tiles + 1)
        grids = [Grid(c, r) for c in tried for r in tried if c * r <= max_tiles]
        self.candidates = sorted(grids, key=lambda grid: grid.columns * grid.rows)
        self.newline, self.separator = Mark(d_model), Mark(d_model)

    def grid(self, width: int, height: int, n_images: int = 1) -> Grid:
        if n_images > self.most_images:
            return ONE
        return max(self.candidates, key=lambda grid: self._merit(grid, width, height))

    def _merit(self, grid: Grid, width: int, height: int) -> tuple[int, int]:
        """Pixels shown, and the pixels wasted with a minus. The rounding is the released code's: ties depend on it."""
        across, down = (n * self.tile for n in grid)
        scale = min(across / width, down / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - across * down

    def canvases(self, grid: Grid) -> list[Grid]:
        return [ONE] if grid == ONE else [ONE, grid]

    def count(self, grid: Grid) -> int:
        c, r = grid
        return self.side * (self.side + 1) + 1 + r * self.side * (c * self.side + 1)

    def sequence(self, features: Tensor, grid: Grid) -> Tensor:
        tiles = features[-grid.columns * grid.rows :].unflatten(0, (grid.rows, grid.columns))
        joined = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [r·s, c·s, D]
        views = [self.newline.close(view) for view in (features[0], joined)]
        first, last = views if self.global_view == "head" else reversed(views)
        return torch.cat((first, self.separator()[None], last))
