"""Definitions of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockwright.lab.ablation import definition as ablation
from blockwright.lab.calibration import control
from blockwright.lab.definitions import Files
from blockwright.lab.ladder import definition as ladder
from blockwright.registry import user_conf


@pytest.mark.parametrize("files", [ablation.FILES, control.FILES, ladder.FILES], ids=lambda each: each.kind)
def test_one_in_the_folder_of_the_user_is_found(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(user_conf.VARIABLE, str(tmp_path))
    (tmp_path / files.folder.name).mkdir()
    (tmp_path / files.folder.name / "own.yaml").write_text("about: mine\n")
    assert "own" in files.names() and files.about("own") == "mine"
