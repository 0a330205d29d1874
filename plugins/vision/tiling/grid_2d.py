from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from blockwright.plugins.vision.tiling.base import ONE, Grid, Mark, Tiling
from blockwright.registry import register
from blockwright.registry.ranges import Whole


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
