"""Pictures as PDF and PNG look as they do in a browser's light mode."""

import contextlib
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from blockwright.lab.difference import request as diff
from blockwright.lab.drawing import request as draw
from blockwright.lab.drawing.alone import alone, block_picture
from blockwright.lab.drawing.export import RESOLUTION, WIDTH, exported, plain
from blockwright.registry import ConfigError


def test_colours_are_written_out() -> None:
    svg = block_picture(alone("attention", "mla"))
    assert "var(" in svg and "@media" in svg
    assert "var(" not in plain(svg) and "@media" not in plain(svg)


def test_png_has_the_width_and_the_colours_of_light_mode() -> None:
    image = Image.open(io.BytesIO(exported(block_picture(alone("attention", "mla")), "png"))).convert("RGB")
    assert abs(image.width - WIDTH / 72 * RESOLUTION) <= 1
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert {(255, 255, 255), (0xE4, 0xEE, 0xFA), (0xFD, 0xF1, 0xD4)} <= colours


def test_pdf_is_one_page_as_wide_as_a_column_and_the_same_each_time() -> None:
    svg = block_picture(alone("ffn", "moe"))
    made = exported(svg, "pdf")
    boxes = re.findall(rb"/MediaBox ?\[([^\]]*)\]", made + b"".join(_streams(made)))
    assert len(boxes) == 1 and abs(float(boxes[0].split()[2]) - WIDTH) < 0.1
    assert exported(svg, "pdf") == made


def test_draw_and_diff_refuse_a_file_in_the_same_words(tmp_path: Path) -> None:
    for name in ("picture.gif", "picture", str(tmp_path / "none" / "picture.svg"), str(tmp_path / "picture.svg")):
        (tmp_path / "picture.svg").mkdir(exist_ok=True)
        said = []
        for read in (draw.request, diff.read):
            with pytest.raises(ConfigError) as refused:
                read(["tiny", "model/attention=gqa", "--out", name])
            said.append(refused.value.render())
        assert said[0] == said[1] and "--out" in said[0]


def _streams(pdf: bytes) -> Iterator[bytes]:
    """The compressed parts of a PDF."""
    for found in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.S):
        with contextlib.suppress(zlib.error):
            yield zlib.decompress(found[1])
