"""``blockwright draw`` as a command."""

import contextlib
import io
import re
import zlib
from xml.etree import ElementTree as ET

import pytest
import yaml
from PIL import Image

from blockwright.lab.drawing.__main__ import main
from blockwright.lab.drawing.export import RESOLUTION, WIDTH, exported
from blockwright.lab.drawing.picture import alone, block_picture
from blockwright.lab.drawing.text import for_encoding
from blockwright.registry import errors, presets
from blockwright.registry.command import run_command
from blockwright.registry.errors import REFUSED

WRONG = [
    ("", "command line"),
    ("tiny model=gpt2", "model"),
    ("tiny attention=gqa", "attention"),
    ("tiny cotext=3", "cotext"),
    ("tiny context=0", "context"),
    ("tiny context=8 context=9", "context"),
    ("tiny --out", "command line"),
    ("tiny --out picture.gif", "--out"),
    ("tiny --out folder.svg", "--out"),
    ("tiny --equations", "--equations"),
    ("attention/mlaa", "attention"),
    ("attention/mla model.d_model=8", "command line"),
    ("missing.yaml", "model"),
    ("tiny model.attention.n_heads=7 model/attention=gqa", "model.attention.n_heads"),
]


@pytest.mark.parametrize(("line", "path"), WRONG)
def test_mistake_is_one_message(line, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    assert run_command(main, line.split()) == REFUSED
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("error: ") == 1 and "remedy: " in said.err
    assert said.err.startswith(f"error: {path}"), said.err
    assert [file.name for file in tmp_path.rglob("*")] == ["folder.svg"]


def test_text_on_a_terminal(capsys):
    assert run_command(main, ["tiny", "model/attention=gqa", "context=8"]) == 0
    said = capsys.readouterr().out
    for part in ("layers 1–3 × 3", "─ moe ─", "▒ k 2 × 24", "4 of 16", "rmsnorm", "as in B"):
        assert part in said, said
    assert max(map(len, said.splitlines())) <= 80 and not said.isascii()
    for encoding in ("ascii", "latin-1", None):
        plain = for_encoding(said, encoding)
        assert plain.isascii() and "?" not in plain
    assert for_encoding(said, "utf-8") == said


@pytest.mark.parametrize("name", ["picture.pdf", "picture.png"])
def test_files(name, tmp_path):
    file = tmp_path / name
    assert run_command(main, ["tiny", "context=8", "--equations", "--out", str(file)]) == 0
    starts = {".svg": b"<svg", ".pdf": b"%PDF", ".png": b"\x89PNG"}
    assert file.read_bytes().startswith(starts[file.suffix])


def test_picture_is_of_what_the_overrides_make(tmp_path):
    file = tmp_path / "picture.svg"
    assert run_command(main, ["tiny", "model/attention=gqa", "context=8", "--out", str(file)]) == 0
    root = ET.parse(file).getroot()
    groups = {g.get("data-path"): g for g in root.iter("{http://www.w3.org/2000/svg}g")}
    assert groups["layers.0.attention"].get("data-name") == "gqa"
    assert groups["layers.0.attention"].get("data-written") == "model.attention"
    assert "model/attention=gqa" in (root.findtext("{http://www.w3.org/2000/svg}title") or "")


def test_name_of_a_file_moves_no_cursor_and_breaks_no_picture(tmp_path, capsys):
    name = "a\x1b[31mb\x01\udcff\ufffe\n<script>]]>&quot;"
    model, file = tmp_path / f"{name}.yaml", tmp_path / "picture.svg"
    model.write_text(yaml.safe_dump({**presets.read("tiny"), "vocab_size": 257, "n_layers": 1}))
    assert run_command(main, [str(model), "context=8"]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
    assert run_command(main, [str(model), "context=8", "--out", str(file)]) == 0
    shown = "".join(letter if letter.isprintable() else "·" for letter in model.name)
    assert ET.parse(file).getroot().findtext("{http://www.w3.org/2000/svg}title") == shown


@pytest.mark.parametrize("kind", ["pdf", "png"])
def test_missing_extra_is_named_before_work(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "has_package", lambda name: False)
    assert run_command(main, ["tiny", "--out", str(tmp_path / f"picture.{kind}")]) == REFUSED
    assert "blockwright[draw]" in capsys.readouterr().err
    assert run_command(main, ["attention/mla", "--out", str(tmp_path / "picture.svg")]) == 0


def test_pdf_and_png_have_the_width_and_the_colours_of_light_mode():
    image = Image.open(io.BytesIO(exported(block_picture(alone("attention", "mla")), "png"))).convert("RGB")
    assert abs(image.width - WIDTH / 72 * RESOLUTION) <= 1
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert {(255, 255, 255), (0xE4, 0xEE, 0xFA), (0xFD, 0xF1, 0xD4)} <= colours
    svg = block_picture(alone("ffn", "moe"))
    made = exported(svg, "pdf")
    boxes = re.findall(rb"/MediaBox ?\[([^\]]*)\]", made + b"".join(_streams(made)))
    assert len(boxes) == 1 and abs(float(boxes[0].split()[2]) - WIDTH) < 0.1
    assert exported(svg, "pdf") == made


def _streams(pdf):
    """The compressed parts of a PDF."""
    for found in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.S):
        with contextlib.suppress(zlib.error):
            yield zlib.decompress(found[1])
