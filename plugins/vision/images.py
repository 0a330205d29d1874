"""The contract of ``images``: embeddings of pictures, which take the places of a token of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.input import Input
from blockwright.plugins.vision.projector import Projector
from blockwright.plugins.vision.tiling import Grid, Tiling
from blockwright.plugins.vision.vision import Vision
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Whole


class Pictures(NamedTuple):
    """The pictures of a batch, in the order of their places: row by row, left to right.

    tiles: [N,3,P,P] uint8 RGB, those of each picture in the order of its tiling
    grids: (columns, rows) of each picture
    """

    tiles: Tensor
    grids: Sequence[Grid]


@family("images", context=("vocab_size",), in_layers=False)
class Images(Input):
    """The image side of a decoder.

    A batch has ``images.tiles``, as in ``Pictures``, and ``images.grids`` [M,2].

    Attributes:
        image_token: id of the token whose places the embeddings take; a picture has as many places as embeddings
        vision, tiling: its tower, and how its tiles are cut and put together
    """

    catalogue_example: ClassVar[Any] = {"name": "early_fusion", "image_token": 60}

    image_token: int
    vision: Vision
    tiling: Tiling

    @property
    def token(self) -> int:  # type: ignore[override]
        return self.image_token

    @property
    def stack(self) -> Sequence[nn.Module]:
        return self.vision.stack

    @property
    def stack_width(self) -> int:
        return self.vision.width

    def read(self, parts: Mapping[str, Tensor]) -> Pictures:
        return Pictures(parts["tiles"], [Grid(*grid) for grid in parts["grids"].tolist()])

    def forward(self, content: Pictures) -> Tensor:
        raise NotImplementedError

    def count(self, content: Pictures) -> int:
        return sum(map(self.tiling.count, content.grids))

    def misplaced(self, n_places: int, n_embeddings: int, content: Pictures) -> BlockError:
        rule = f"the text has {n_places} places for images, and its images have {n_embeddings} embeddings"
        remedy = "Repeat the image token as often as the tiling counts for each image"
        return BlockError("images", [tuple(grid) for grid in content.grids], rule, remedy)

    def cost_examples(self) -> dict[str, tuple[Pictures, dict[str, int]]]:
        """Pictures as large as one tile of the tower, and as 3 × 3."""
        return {f"{side}x{side}": self._square(side) for side in (1, 3)}

    def _square(self, side: int) -> tuple[Pictures, dict[str, int]]:
        P = self.vision.tile
        grid = self.tiling.grid(side * P, side * P)
        n_tiles, device = self.tiling.n_tiles(grid), next(self.parameters()).device
        return Pictures(torch.zeros(n_tiles, 3, P, P, dtype=torch.uint8, device=device), [grid]), {"tiles": n_tiles}

    def conformance_content(self, rows: int, device: torch.device) -> Pictures:
        """Two pictures a row, one wide and one high."""
        grids = [self.tiling.grid(*size, 2) for size in ((120, 40), (20, 300))]
        shape = (sum(map(self.tiling.n_tiles, grids)), 3, self.vision.tile, self.vision.tile)
        tiles = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(device)
        return Pictures(tiles.repeat(rows, 1, 1, 1), grids * rows)


REMEDY = (
    "Write the id that the tokenizer gives <image>; or leave one free, e.g. data.tokenizer.vocab_size=258 with bytes"
)


@register("images", "early_fusion")
class EarlyFusion(Images):
    """Tiles → vision tower → projector → sequence, which the decoder reads among its tokens.

    As in LLaVA (Liu et al. 2023, arXiv 2304.08485) and DeepSeek-VL2 (arXiv 2412.10302). Positions run through image and
    text alike, attention stays causal, and a mixture of experts routes image places as any others.

    Args:
        image_token: id of the token that marks the places of an image; 128815 in DeepSeek-VL2 tiny and base, 100003 in
            small
        vision: encodes each tile
        projector: brings features to the decoder's width
        tiling: how an image is cut into tiles, and how their features become a sequence
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "image_token": 60,
        "vision": {"name": "siglip", "tile": 16, "patch": 5, "width": 48, "depth": 1, "n_heads": 4},
        "projector": "downsample_mlp",
        "tiling": {"name": "grid_2d", "max_tiles": 4},
    }

    def __init__(
        self, vocab_size: int, vision: Vision, projector: Projector, tiling: Tiling, image_token: Whole
    ) -> None:
        super().__init__()
        if image_token >= vocab_size:
            rule = f"is the id of a token, so it is below vocab_size ({vocab_size})"
            raise BlockError("image_token", image_token, rule, REMEDY)
        self.vision, self.projector, self.tiling, self.image_token = vision, projector, tiling, image_token

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        if child == "projector":
            return {"width": known["vision"].width, "side": known["vision"].side}
        return {"tile": known["vision"].tile, "side": known["projector"].side_out} if child == "tiling" else {}

    def forward(self, content: Pictures) -> Tensor:
        return self.tiling(self.projector(self.vision(content.tiles)), content.grids)
