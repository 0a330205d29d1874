"""Pictures of a prompt, and boxes drawn into them: ``blockwright generate … --image FILE --boxes FILE.png``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch

from blockwright.blocks.decoder import Decoder
from blockwright.lab.attachment import Attachment
from blockwright.plugins.vision.data.picture_conversations import WORD, Box, boxes
from blockwright.plugins.vision.data.picture_rows import grid_of
from blockwright.plugins.vision.data.pictures import Files, open_picture, tiles_of
from blockwright.plugins.vision.images import Images, Pictures
from blockwright.plugins.vision.tiling import Grid
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageFiles(Attachment):
    """Pictures that ``<image>`` stands for, in order over all prompts.

    Args:
        files: of the pictures
        boxes: PNG to write: the first picture with the boxes that the first continuation names; None for none
    """

    word: ClassVar[str] = "image"
    mark: ClassVar[str] = WORD

    files: tuple[str, ...]
    boxes: str | None = None

    @staticmethod
    def add_options(parser: Parser) -> None:
        parser.add_argument(
            "--image", action="append", default=[], metavar="FILE", help="for each <image> of the prompts"
        )
        parser.add_argument("--boxes", metavar="FILE.png", help="draw the boxes that are written into the first image")

    @classmethod
    def of(cls, options: Namespace) -> Self | None:
        if options.boxes is not None:
            _check_boxes(options.boxes, options.image)
        return cls(tuple(options.image), options.boxes) if options.image else None

    @classmethod
    def of_files(cls, files: Sequence[str]) -> Self:
        return cls(tuple(files))

    @staticmethod
    def refuse_marks(prompts: Sequence[str]) -> None:
        if shown := [prompt for prompt in prompts if WORD in prompt]:
            rule = f"has {WORD}, and no --image is given: the model would read the word"
            raise ConfigError("--prompt", shown[0], rule, f"Add --image FILE, or leave {WORD} out")

    def encode(
        self, decoder: Decoder, prompts: Sequence[str], ids_of: Callable[[str], list[int]]
    ) -> tuple[list[list[int]], dict[str, Pictures]]:
        images = decoder.inputs.get("images")
        if not isinstance(images, Images):
            remedy = "Choose a model with images, e.g. one of deepseek_vl2_*, or leave --image out"
            raise ConfigError("--image", self.files[0], "this model reads text alone", remedy)
        wanted = sum(prompt.count(WORD) for prompt in prompts)
        if wanted != len(self.files):
            rule = f"the prompts have {wanted} {WORD}, and there are {len(self.files)} pictures"
            raise ConfigError("--image", list(self.files), rule, f"Write one {WORD} in a prompt for each --image")
        opened = Files("--image", [Path(file) for file in self.files], "--image")
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
        return ids, {"images": Pictures(whole, grids)}

    def finish(self, text: str) -> None:
        if self.boxes is not None:
            drawn(open_picture(Path(self.files[0]), "--image"), boxes(text)).save(self.boxes)


def _check_boxes(file: str, images: Sequence[str]) -> None:
    remedy = "Write e.g. --image page.jpg --boxes boxes.png"
    if not (images and file.endswith(".png") and Path(file).parent.is_dir()):
        rule = "names a PNG in a folder that exists, and there is an --image to draw into"
        raise ConfigError("--boxes", file, rule, remedy)
    if Path(file).resolve() in [Path(image).resolve() for image in images]:
        raise ConfigError("--boxes", file, "would be written over a picture of --image", remedy)


def drawn(picture: Image, found: Sequence[Box]) -> Image:
    """A copy of a picture with boxes drawn into it."""
    from PIL import ImageDraw

    copy = picture.copy()
    pen, (width, height) = ImageDraw.Draw(copy), (picture.width - 1, picture.height - 1)
    for x1, y1, x2, y2 in found:
        corners = (x1 * width / 999, y1 * height / 999, x2 * width / 999, y2 * height / 999)
        pen.rectangle(corners, outline="red", width=max(1, min(picture.size) // 200))
    return copy
