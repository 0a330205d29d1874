"""Which exceptions are a user's mistake, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.entry.main import refusal_of


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(OSError) as caught:
            folder.mkdir()
        error = refusal_of(caught.value, [])
        assert error is not None and error.value == str(folder) and "hydra.run.dir=DIR" in error.remedy


def test_other_errors_keep_their_traceback() -> None:
    assert refusal_of(FileNotFoundError(2, "No such file or directory", "x"), []) is None
    assert refusal_of(PermissionError("no file"), []) is None
    assert refusal_of(KeyError("x"), []) is None
