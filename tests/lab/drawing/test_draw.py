"""``blockwright draw`` as a command."""

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml

from blockwright.lab.drawing.__main__ import main
from blockwright.lab.drawing.text import for_encoding
from blockwright.registry import extras, presets
from blockwright.registry.command import run_command
from blockwright.registry.errors import REFUSED

WRONG = [
    ("", "command line"),
    ("model=tiny", "command line"),
    ("tiny model=gpt2", "model"),
    ("tiny attention=gqa", "attention"),
    ("tiny seed=3", "seed"),
    ("tiny cotext=3", "cotext"),
    ("tiny context=0", "context"),
    ("tiny context=many", "context"),
    ("tiny context=8 context=9", "context"),
    ("tiny --out", "command line"),
    ("tiny --out picture.gif", "--out"),
    ("tiny --out folder.svg", "--out"),
    ("tiny --equations", "--equations"),
    ("attention/mlaa", "attention"),
    ("attention/mla model.d_model=8", "command line"),
    ("atention/mla", "model"),
    ("missing.yaml", "model"),
    ("tiny model/attention=mlaa", "model/attention"),
    ("tiny model.attention.n_heads=7 model/attention=gqa", "model.attention.n_heads"),
]


@pytest.mark.parametrize(("line", "path"), WRONG)
def test_mistake_is_one_message(
    line: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    assert run_command(main, line.split()) == REFUSED
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("error: ") == 1 and "remedy: " in said.err
    assert said.err.startswith(f"error: {path}"), said.err
    assert [file.name for file in tmp_path.rglob("*")] == ["folder.svg"]


def test_text_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["tiny", "model/attention=gqa", "context=8"]) == 0
    said = capsys.readouterr().out
    for part in ("layers 1–3 × 3", "─ moe ─", "▒ k 2 × 24", "4 of 16", "rmsnorm", "as in B"):
        assert part in said, said
    assert max(map(len, said.splitlines())) <= 80


def test_text_is_ascii_where_the_encoding_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["attention/kda"]) == 0
    said = capsys.readouterr().out
    assert not said.isascii()
    for encoding in ("ascii", "latin-1", None):
        plain = for_encoding(said, encoding)
        assert plain.isascii() and "?" not in plain
    assert for_encoding(said, "utf-8") == said


@pytest.mark.parametrize("name", ["picture.pdf", "picture.png"])
def test_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    assert run_command(main, ["tiny", "context=8", "--equations", "--out", str(file)]) == 0
    starts = {".svg": b"<svg", ".pdf": b"%PDF", ".png": b"\x89PNG"}
    assert file.read_bytes().startswith(starts[file.suffix])


def test_picture_is_of_what_the_overrides_make(tmp_path: Path) -> None:
    file = tmp_path / "picture.svg"
    assert run_command(main, ["tiny", "model/attention=gqa", "context=8", "--out", str(file)]) == 0
    root = ET.parse(file).getroot()
    groups = {g.get("data-path"): g for g in root.iter("{http://www.w3.org/2000/svg}g")}
    assert groups["layers.0.attention"].get("data-name") == "gqa"
    assert groups["layers.0.attention"].get("data-written") == "model.attention"
    assert "model/attention=gqa" in (root.findtext("{http://www.w3.org/2000/svg}title") or "")


def test_composition_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("inherits: tiny\nvocab_size: 99\nn_layers: 2\n")
    assert run_command(main, [str(tmp_path / "mine.yaml"), "context=8"]) in (0, REFUSED)
    assert "Traceback" not in capsys.readouterr().err


def test_name_of_a_file_moves_no_cursor_and_breaks_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[31mb\x01\udcff\ufffe\n<script>]]>&quot;"
    model, file = tmp_path / f"{name}.yaml", tmp_path / "picture.svg"
    model.write_text(yaml.safe_dump({**presets.read("tiny"), "vocab_size": 257, "n_layers": 1}))
    assert run_command(main, [str(model), "context=8"]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
    assert run_command(main, [str(model), "context=8", "--out", str(file)]) == 0
    shown = "".join(letter if letter.isprintable() else "·" for letter in model.name)
    assert ET.parse(file).getroot().findtext("{http://www.w3.org/2000/svg}title") == shown


@pytest.mark.parametrize("kind", ["pdf", "png"])
def test_missing_extra_is_named_before_work(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "has_package", lambda name: False)
    assert run_command(main, ["tiny", "--out", str(tmp_path / f"picture.{kind}")]) == REFUSED
    assert "blockwright[draw]" in capsys.readouterr().err
    assert run_command(main, ["attention/mla", "--out", str(tmp_path / "picture.svg")]) == 0


def test_help_names_the_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--help"]) == 0
    assert "KIND/NAME" in capsys.readouterr().out
