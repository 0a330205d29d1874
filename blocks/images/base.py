"""The contract of ``images``: embeddings of pictures, which take the places of a token of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.tiling.base import Grid, Tiling
from blockwright.blocks.vision.base import Vision
from blockwright.registry import BlockError, family


class Pictures(NamedTuple):
    """The pictures of a batch, in the order of their places: row by row, left to right.

    tiles: [N,3,P,P] uint8 RGB, those of each picture in the order of its tiling
    grids: (columns, rows) of each picture
    """

    tiles: Tensor
    grids: Sequence[Grid]

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Pictures | None:
        """Those of a training batch, whose ``grids`` are [M,2]; None for a batch of text."""
        return cls(batch["tiles"], [Grid(*grid) for grid in batch["grids"].tolist()]) if "tiles" in batch else None


@family("images", context=("vocab_size",), in_layers=False)
class Images(Block):
    """The image side of a decoder.

    Attributes:
        image_token: id of the token whose places the embeddings take; a picture has as many places as embeddings
        vision, tiling: its tower, and how its tiles are cut and put together
    """

    image_token: int
    vision: Vision
    tiling: Tiling

    def forward(self, pictures: Pictures) -> Tensor:
        """Pictures → embeddings [Σ,D], of all their places in order."""
        raise NotImplementedError

    def place(self, x: Tensor, tokens: Tensor, pictures: Pictures) -> Tensor:
        """Embeddings x [B,T,D] of tokens [B,T], with those of the pictures at the places of ``image_token``.

        Raises:
            BlockError: there are more or fewer places than embeddings. On an accelerator an assertion fails instead, so
                that the host does not wait
        """
        found, places = self(pictures), tokens == self.image_token
        if tokens.is_cpu and not torch.compiler.is_compiling():
            self._compare(int(places.sum()), len(found), pictures.grids)
        else:
            torch._assert_async(places.sum() == len(found), "a text needs a place for each embedding of its images")
        return x.masked_scatter(places[..., None], found.to(x.dtype))

    def _compare(self, n_places: int, n_found: int, grids: Sequence[Grid]) -> None:
        if n_places != n_found:
            rule = f"the text has {n_places} places for images, and its images have {n_found} embeddings"
            remedy = "Repeat the image token as often as the tiling counts for each image"
            raise BlockError("images", [tuple(grid) for grid in grids], rule, remedy)
