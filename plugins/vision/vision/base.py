"""The contract of ``vision``: turn square tiles of an image into a grid of features."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.registry import family


@family("vision", in_layers=False)
class Vision(Block):
    """Encodes tiles of P × P pixels, each by itself, as S × S features of width W.

    Class attributes:
        mean, std: by which red, green and blue, between 0 and 1, are normalised

    Attributes:
        tile: P, pixels a side
        side: S, features a side
        width: W
    """

    catalogue_example: ClassVar[Any] = {"name": "siglip", "tile": 28, "patch": 7, "width": 64, "depth": 2, "n_heads": 4}

    mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    counted_as: ClassVar[str | None] = "vision"
    # Pixels have no gradient: of the product that embeds patches only that of its weight is computed.
    flops_within: ClassVar[float | None] = 0.03
    tile: int
    side: int
    width: int

    @property
    def stack(self) -> list[nn.Module]:
        """Its blocks, if it is a stack of them: they are sharded and recomputed one by one."""
        return list(getattr(self, "layers", ()))

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles [N,3,P,P] uint8 → features [N,S,S,W]."""
        raise NotImplementedError

    def normalised(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """Tiles [N,3,P,P] uint8 → the same in a dtype, normalised in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        mean, std = (torch.tensor(x, dtype=wide, device=tiles.device)[:, None, None] for x in (self.mean, self.std))
        return ((tiles.to(wide) / 255 - mean) / std).to(dtype)
