"""Pictures as a vision tower takes them: opened with Pillow, fitted on canvases, cut into tiles. Extra ``vision``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from blocks.tiling.base import Grid, Tiling
from blocks.vision.base import Vision
from registry.errors import ConfigError
from registry.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

SETTING = "data.corpus.files"
WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # one channel of more than 8 bits


def open_picture(path: Path, setting: str = SETTING) -> Image:
    """A file as a picture in RGB, turned as its EXIF data says; 16 bits become the upper 8.

    Args:
        path: of the file
        setting: configuration path, for messages

    Raises:
        ConfigError: no picture, a broken, empty or animated one, or one of too many pixels, with the name of the file
    """
    require("vision", "PIL", path=setting, value=str(path))
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if getattr(file, "n_frames", 1) > 1:
                    _refuse(path, setting, f"is animated, with {file.n_frames} frames", "Save one frame as a picture")  # type: ignore[attr-defined]
                file.load()
                picture = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        rule = f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        _refuse(path, setting, rule, "Make it smaller")
    except FileNotFoundError:
        _refuse(path, setting, "does not exist", "Correct the path; it is relative to the file that names it")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        _refuse(path, setting, f"cannot be read as a picture ({str(error)[:200]})", "Save it as PNG or JPEG")
    if not picture.width or not picture.height:
        _refuse(path, setting, "has no pixels", "Remove it")
    if picture.mode in WIDE:
        values = np.asarray(picture).astype(np.float64)
        scale = 256.0 if picture.mode != "F" and values.max(initial=0) > 255 else 1.0
        picture = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


def _refuse(path: Path, setting: str, rule: str, remedy: str) -> NoReturn:
    raise ConfigError(setting, str(path), rule, remedy) from None


def tiles_of(picture: Image, grid: Grid, vision: Vision, tiling: Tiling) -> npt.NDArray[np.uint8]:
    """The tiles of a picture, [n,3,P,P] RGB.

    On each canvas of the tiling the picture is enlarged or reduced to fit, its shape kept, centred on the mean colour:
    ``ImageOps.pad`` with bicubic interpolation, as in DeepSeek-VL2. Each canvas is cut row by row.
    """
    from PIL import ImageOps

    P, colour = vision.tile, tuple(int(255 * mean) for mean in vision.mean)
    cut = []
    for c, r in tiling.canvases(grid):
        fitted = np.asarray(ImageOps.pad(picture, (c * P, r * P), color=colour))  # [rP, cP, 3]
        cut.append(fitted.reshape(r, P, c, P, 3).transpose(0, 2, 4, 1, 3).reshape(r * c, 3, P, P))
    return np.concatenate(cut)
