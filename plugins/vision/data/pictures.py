"""Pictures as a vision tower takes them: opened with Pillow, fitted on canvases, cut into tiles. Extra ``vision``."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, overload

import numpy as np
import numpy.typing as npt

from blockwright.plugins.vision.tiling import Grid, Tiling
from blockwright.plugins.vision.vision import Vision
from blockwright.registry.errors import ConfigError, require

if TYPE_CHECKING:
    from PIL.Image import Image

SETTING = "data.corpus.files"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # not those that run an interpreter
WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # one channel of more than 8 bits
SCALED = ("PPM", "JPEG2000")
PIXELS = 2**25  # of a picture: 5,792 × 5,792; some 300 MB while it is opened
TOGETHER = 2**29  # of the pictures of a conversation
NAMED = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM and JPEG 2000"


def no_file(path: Path) -> str:
    """Why a path names no ordinary file; empty if it names one. Nothing is opened: a pipe would block."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be found ({getattr(error, 'strerror', None) or error})"
    return "" if stat.S_ISREG(mode) else "is a folder" if stat.S_ISDIR(mode) else "is no ordinary file"


class Files(Sequence["Image"]):
    """The pictures in files, each opened when it is asked for and not kept: memory is that of one.

    Together they have at most ``TOGETHER`` pixels.

    Args:
        where: of their conversation, for messages
        paths: of the files
        setting: configuration path, for messages
    """

    def __init__(self, where: str, paths: Sequence[Path], setting: str = SETTING) -> None:
        self.where, self.paths, self.setting = where, paths, setting

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Image]:
        left = TOGETHER
        for path in self.paths:
            picture = open_picture(path, self.setting)
            left -= picture.width * picture.height
            if left < 0:
                rule = f"its pictures have more than {TOGETHER:,} pixels together"
                raise ConfigError(self.setting, self.where, rule, "Make them smaller, or divide the conversation")
            yield picture

    @overload
    def __getitem__(self, index: int) -> Image: ...

    @overload
    def __getitem__(self, index: slice) -> Files: ...

    def __getitem__(self, index: int | slice) -> Image | Files:
        if isinstance(index, slice):
            return Files(self.where, self.paths[index], self.setting)
        return open_picture(self.paths[index], self.setting)


def open_picture(path: Path, setting: str = SETTING) -> Image:
    """A file as a picture in RGB, turned as its EXIF data says.

    16 bits become the upper 8. What is transparent shows white. A grey picture that declares 16 bits and uses at most
    12 is refused: nothing says whether it is dark, or counts in other units.

    Args:
        path: of the file
        setting: configuration path, for messages

    Raises:
        ConfigError: no ordinary file, no picture, a broken, empty or animated one, one of more than ``PIXELS`` pixels
            or of numbers without a known range, with the name of the file
    """
    require("vision", "PIL", path=setting, value=str(path)[:80])
    from PIL import Image, ImageOps

    if fault := no_file(path):
        _refuse(path, setting, fault, "Correct the path")
    too_large, n_frames = False, 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is lower
            with Image.open(path, formats=FORMATS) as picture:
                n_frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # a photograph and preview
                too_large, form = picture.width * picture.height > PIXELS, str(picture.format)
                if n_frames == 1 and not too_large:
                    picture.load()
                    ImageOps.exif_transpose(picture, in_place=True)
    except Image.DecompressionBombError:
        too_large = True
    except Exception as error:  # decoders raise whatever a broken file makes them
        rule = f"cannot be read as a picture ({str(error)[:200] or type(error).__name__})"
        _refuse(path, setting, rule, f"Read are {NAMED}")
    if too_large:
        _refuse(path, setting, f"has more than {PIXELS:,} pixels", "Make it smaller")
    if n_frames > 1:
        _refuse(path, setting, f"is animated, with {n_frames} frames", "Save one frame as a picture")
    if not picture.width or not picture.height:
        _refuse(path, setting, "has no pixels", "Remove it")
    return _on_white(_in_8_bits(picture, form, path, setting))


def _on_white(picture: Image) -> Image:
    """In RGB; transparent pixels show a white ground."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(seen, mask=seen.getchannel("A"))
    return ground


def _in_8_bits(picture: Image, form: str, path: Path, setting: str) -> Image:
    """A picture of one channel of more than 8 bits with the upper 8; another as it is.

    Args:
        form: of the file. Pillow scales the numbers of SCALED to 16 bits, by the largest that the file declares
    """
    from PIL import Image

    if picture.mode == "F":
        _refuse(path, setting, "has floating-point pixels, whose range is not known", "Save it with 8 or 16 bits")
    if picture.mode not in WIDE:
        return picture
    values = np.asarray(picture)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > 65535:
        _refuse(path, setting, "has pixels of more than 16 bits", "Save it with 8 or 16 bits")
    if 0 < most < 4096 and form not in SCALED:
        rule = f"declares 16 bits, and its largest value is {most:,} of 65,535: it would be nearly black"
        _refuse(path, setting, rule, "Save it with 8 bits, or scaled to all of the 16")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _refuse(path: Path, setting: str, rule: str, remedy: str) -> NoReturn:
    shown = str(path)
    raise ConfigError(setting, shown if len(shown) <= 300 else f"{shown[:300]}…", rule, remedy) from None


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
