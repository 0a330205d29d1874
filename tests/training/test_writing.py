"""A file is whole or as it was, whenever its writer ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blockwright.training.writing import write_json, write_text


def test_text_is_what_was_written_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "1 ± 2\n")
    write_text(file, "3 ± 4\n")
    assert file.read_bytes().decode("utf-8") == "3 ± 4\n" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_writer_that_ends_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
