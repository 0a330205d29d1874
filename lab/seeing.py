"""Pictures of a prompt, and boxes drawn into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.images.base import Pictures
from blockwright.blocks.tiling.base import Grid
from blockwright.registry import ConfigError
from blockwright.training.data.boxes import Box
from blockwright.training.data.picture_conversations import WORD
from blockwright.training.data.picture_rows import grid_of
from blockwright.training.data.pictures import Files, tiles_of

if TYPE_CHECKING:
    from PIL.Image import Image


def encode(
    decoder: Decoder, prompts: Sequence[str], files: Sequence[str], ids_of: Callable[[str], list[int]]
) -> tuple[list[list[int]], Pictures]:
    """Prompts whose ``<image>`` stand for the files, in order over all prompts.

    Args:
        decoder: with an image side
        prompts: each with ``<image>`` where a picture stands
        files: of the pictures
        ids_of: encodes a text

    Returns:
        the ids of each prompt, and the pictures

    Raises:
        ConfigError: at ``--image``: the model reads text alone, a file is no picture, or the numbers disagree
    """
    images: Any = decoder.images
    if images is None:
        remedy = "Choose a model with images, e.g. one of deepseek_vl2_*, or leave --image out"
        raise ConfigError("--image", files[0], "this model reads text alone", remedy)
    wanted = sum(prompt.count(WORD) for prompt in prompts)
    if wanted != len(files):
        rule = f"the prompts have {wanted} {WORD}, and there are {len(files)} pictures"
        raise ConfigError("--image", list(files), rule, f"Write one {WORD} in a prompt for each --image")
    opened = Files("--image", [Path(file) for file in files], "--image")
    ids, tiles, grids = [], [], list[Grid]()
    for prompt in prompts:
        first, *others = prompt.split(WORD)
        row, own = ids_of(first) if first else [], opened[len(grids) : len(grids) + len(others)]
        for picture, text in zip(own, others, strict=True):
            grid = grid_of(images, picture, len(own), "--image")
            row += [images.image_token] * images.tiling.count(grid) + (ids_of(text) if text else [])
            tiles.append(tiles_of(picture, grid, images.vision, images.tiling))
            grids.append(grid)
        ids.append(row)
    whole = torch.from_numpy(np.concatenate(tiles)).to(decoder.embedding.weight.device)
    return ids, Pictures(whole, grids)


def drawn(picture: Image, found: Sequence[Box]) -> Image:
    """A copy of a picture with boxes drawn into it."""
    from PIL import ImageDraw

    copy = picture.copy()
    pen, (width, height) = ImageDraw.Draw(copy), (picture.width - 1, picture.height - 1)
    for x1, y1, x2, y2 in found:
        corners = (x1 * width / 999, y1 * height / 999, x2 * width / 999, y2 * height / 999)
        pen.rectangle(corners, outline="red", width=max(1, min(picture.size) // 200))
    return copy
