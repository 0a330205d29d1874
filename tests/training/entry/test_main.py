"""Which exceptions are a user's mistake, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockwright.registry import ConfigError
from blockwright.training.entry.main import check_options, refusal_of


@pytest.mark.parametrize(
    ("arguments", "rule", "remedy"),
    [
        (["--lr=0.1"], "unrecognized arguments: --lr=0.1", "lr=VALUE"),
        (["--model", "tiny"], "unrecognized arguments: --model", "model=VALUE"),
        (["--cfg", "nope"], "argument --cfg/-c: invalid choice", "--help"),
        (["-z"], "unrecognized arguments: -z", "--help"),
    ],
)
def test_option_that_hydra_does_not_have_is_one_message(arguments: list[str], rule: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(arguments)
    assert rule in caught.value.rule and remedy in caught.value.remedy


def test_options_of_hydra_pass() -> None:
    for arguments in (["-m", "seed=1,2"], ["--cfg", "job", "model=tiny"], ["--help"], ["-cd", "x"]):
        check_options(arguments)


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
