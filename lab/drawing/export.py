"""A picture as PDF or PNG. The extra ``draw`` brings typst, which sets text with the fonts of the system."""

from __future__ import annotations

import re
from html import escape, unescape
from pathlib import Path

from blockwright.registry.extras import require

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


def refuse_without_extra(file: Path) -> None:
    """Refuse a PDF or PNG without what writes it.

    Raises:
        ConfigError: the extra is not installed
    """
    if file.suffix != ".svg":
        require("draw", "typst", path="--out", value=str(file), otherwise="or write an SVG")


def plain(svg: str) -> str:
    """The picture with the colours of light mode written out: only browsers resolve variables and media queries."""
    style = re.search(r"<style>(.*?)</style>", svg, re.S)
    assert style is not None
    css = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", unescape(style[1]))
    colours = dict(re.findall(r"(--[\w-]+):\s*([^;}]+);", css))
    css = re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], css)
    return svg[: style.start(1)] + escape(css, quote=False) + svg[style.end(1) :]
