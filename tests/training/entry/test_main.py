"""Which exceptions are a user's mistake, and what is said of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockwright.registry import REFUSED, ConfigError
from blockwright.training.entry.main import check_folders, check_options, refusal_of


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


@pytest.mark.parametrize("value", ["1", "-2.5", "1e3", "null", "true", ""])
def test_folder_whose_name_is_no_string_is_refused_before_it_is_made(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_folders(["model=tiny", f"paths.log_dir={value}"])
    assert caught.value.path == "paths.log_dir" and "paths.log_dir=" in caught.value.remedy


def test_other_names_of_folders_pass() -> None:
    check_folders(["paths.log_dir=./1", "paths.log_dir='1'", "paths.data_dir=1a", "seed=1", "paths.log_dir=2026-11-29"])


@pytest.mark.slow
def test_command_leaves_no_folder_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "blockwright.train", "paths.log_dir=1"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == REFUSED and "paths.log_dir = 1" in ended.stderr and not any(tmp_path.iterdir())
