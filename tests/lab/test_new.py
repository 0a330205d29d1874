"""A user's new repository: whole, and nothing of another overwritten. That it works: tests/test_wheel.py."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
import yaml

from blockwright.lab.definitions import Files
from blockwright.lab.new import FILES, TEMPLATE, main
from blockwright.registry import user_conf
from blockwright.training.configuration import conf


def test_every_file_of_the_template_is_written_and_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {file.name for file in TEMPLATE.iterdir()} == set(FILES.values())
    assert main([str(tmp_path / "My-Models")]) == 0
    folder = tmp_path / "My-Models"
    written = [file for file in folder.rglob("*") if file.is_file()]
    assert len(written) == len(FILES) and "my_models/tied.py" in {str(f.relative_to(folder)) for f in written}
    for file in written:
        text = file.read_text()
        assert "PACKAGE" not in text
        if file.suffix == ".py":
            ast.parse(text)
        if file.suffix in (".yaml", ".yml"):
            yaml.safe_load(text)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["blockwright.blocks"] == {"my_models": "my_models"}
    monkeypatch.delenv(user_conf.VARIABLE, raising=False)
    monkeypatch.chdir(folder / "tests")  # anywhere in it
    assert "first" in conf.options("experiment") and "small" in conf.options("model")
    assert "first" in Files("ablation", conf.CONF / "ablation", "no.such.group", ()).names()


@pytest.mark.parametrize("name", ["1st", "class", "json", "torch", "tests", "---", "blockwright"])
def test_a_name_that_no_package_can_have_is_refused(name: str, tmp_path: Path) -> None:
    assert main([str(tmp_path / name)]) == 64 and not (tmp_path / name).exists()


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (folder := tmp_path / "mine").mkdir()
    assert main([str(folder)]) == 0  # empty
    (file := folder / "README.md").write_text("mine")
    assert main([str(folder)]) == 64 == main([str(file)]) and file.read_text() == "mine"
