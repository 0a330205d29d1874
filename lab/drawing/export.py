"""A picture as a file: SVG, PDF or PNG. The extra ``draw`` brings typst, which sets text with the system's fonts."""

from __future__ import annotations

import re
from html import escape, unescape
from pathlib import Path

from blockwright.registry import ConfigError
from blockwright.registry.errors import require
from blockwright.registry.folder import write_bytes

FORMATS = (".svg", ".pdf", ".png")
WIDTH = 237.6  # points: 3.3 inches, the column of a paper
RESOLUTION = 300.0  # pixels per inch
PAGE = b"""#set document(date: none)
#set page(width: auto, height: auto, margin: 0pt)
#image(bytes(sys.inputs.picture), width: eval(sys.inputs.width))"""


def exported(svg: str, kind: str, width: float = WIDTH) -> bytes:
    """A picture in another format, in the colours of light mode.

    Args:
        svg: of lab/drawing/picture.py
        kind: ``pdf`` or ``png``
        width: of the picture, in points
    """
    import typst

    given = {"picture": plain(svg), "width": f"{width}pt"}
    if kind == "png":
        made = typst.compile(PAGE, format="png", ppi=RESOLUTION, sys_inputs=given)
    else:
        made = typst.compile(PAGE, format="pdf", sys_inputs=given)
    assert isinstance(made, bytes)
    return made


def named(text: str) -> Path:
    """The file that ``--out`` names.

    Raises:
        ConfigError: it is no SVG, PDF or PNG, is a folder, or would be in none
    """
    file = Path(text)
    if file.suffix not in FORMATS:
        raise ConfigError("--out", text, f"must end in {', '.join(FORMATS)}", f"Write --out {file.stem or 'model'}.svg")
    if file.is_dir():
        raise ConfigError("--out", text, "is a folder", "Name a file in it")
    if not file.absolute().parent.is_dir():
        raise ConfigError("--out", text, "must be in a folder that exists", "Make the folder, or name another file")
    return file


def refuse_without_extra(file: Path) -> None:
    """Refuse a PDF or PNG without what writes it.

    Raises:
        ConfigError: the extra is not installed
    """
    if file.suffix != ".svg":
        require("draw", "typst", path="--out", value=str(file), otherwise="or write an SVG")


def save(svg: str, file: Path, width: float = WIDTH) -> None:
    """Write a picture in the format that the file's name ends in.

    Args:
        svg, width: as in ``exported``
        file: as from ``named``

    Raises:
        ConfigError: it cannot be written
    """
    kind = file.suffix[1:]
    try:
        write_bytes(file, svg.encode() if kind == "svg" else exported(svg, kind, width))
    except OSError as error:
        raise ConfigError("--out", str(file), f"cannot be written ({error.strerror})", "Name another file") from None


def plain(svg: str) -> str:
    """The picture with the colours of light mode written out: only browsers resolve variables and media queries."""
    style = re.search(r"<style>(.*?)</style>", svg, re.S)
    assert style is not None
    css = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", unescape(style[1]))
    colours = dict(re.findall(r"(--[\w-]+):\s*([^;}]+);", css))
    css = re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], css)
    return svg[: style.start(1)] + escape(css, quote=False) + svg[style.end(1) :]
