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
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # not those that run an interpreter
WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # one channel of more than 8 bits
NAMED = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM and JPEG 2000"


def open_picture(path: Path, setting: str = SETTING) -> Image:
    """A file as a picture in RGB, turned as its EXIF data says; 16 bits become the upper 8.

    Args:
        path: of the file
        setting: configuration path, for messages

    Raises:
        ConfigError: no picture, a broken, empty or animated one, one of too many pixels or of numbers without a known
            range, with the name of the file
    """
    require("vision", "PIL", path=setting, value=str(path))
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                n_frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a photograph and its preview
                if n_frames == 1:
                    file.load()
                    picture = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        rule = f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        _refuse(path, setting, rule, "Make it smaller")
    except FileNotFoundError:
        _refuse(path, setting, "does not exist", "Correct the path")
    except Exception as error:  # decoders raise whatever a broken file makes them
        rule = f"cannot be read as a picture ({str(error)[:200] or type(error).__name__})"
        _refuse(path, setting, rule, f"Read are {NAMED}")
    if n_frames > 1:
        _refuse(path, setting, f"is animated, with {n_frames} frames", "Save one frame as a picture")
    if not picture.width or not picture.height:
        _refuse(path, setting, "has no pixels", "Remove it")
    return _in_8_bits(picture, path, setting).convert("RGB")


def _in_8_bits(picture: Image, path: Path, setting: str) -> Image:
    from PIL import Image

    if picture.mode == "F":
        _refuse(path, setting, "has floating-point pixels, whose range is not known", "Save it with 8 or 16 bits")
    if picture.mode not in WIDE:
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        _refuse(path, setting, "has pixels of more than 16 bits", "Save it with 8 or 16 bits")
    is_wide = picture.mode != "I" or values.max() > 255  # "I" may hold 8 bits as well
    return Image.fromarray((values >> 8 if is_wide else values).astype(np.uint8))


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
