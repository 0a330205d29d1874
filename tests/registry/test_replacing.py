"""A file or a folder is whole or as it was, whenever its writer ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockwright.registry.folder import replaced


def test_file_is_replaced_once_it_is_in_storage_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync") or sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    (tmp_path / "a.txt").write_text("old")
    with replaced(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
    assert calls == ["fsync", "replace"]


def test_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with replaced(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "a").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


@pytest.mark.parametrize(("error", "is_folder"), [(OSError, False), (KeyboardInterrupt, True)])
def test_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException], is_folder: bool) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), replaced(tmp_path / "a") as partial:
        partial.mkdir() if is_folder else partial.write_text("ne")
        raise error
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_remains_of_a_killed_writer_are_removed_by_the_next_and_those_of_another_stay(
    tmp_path: Path, is_folder: bool
) -> None:
    program = f"""
from pathlib import Path
from blockwright.registry.folder import replaced
with replaced(Path("a")) as partial:
    {"partial.mkdir(); (partial / 'x').touch()" if is_folder else "partial.touch()"}
    print("begun", flush=True)
    input()
"""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, **pipes) as other:
        assert other.stdout and other.stdout.readline() == "begun\n"
        (theirs,) = os.listdir(tmp_path)
        (tmp_path / f".ab{theirs[2:]}").touch()  # of another path
        elsewhere = ".".join([*theirs.split(".")[:2], "01234567_1", *theirs.split(".")[-2:]])
        (tmp_path / elsewhere).touch()  # of another machine

        def write() -> set[str]:
            with replaced(tmp_path / "a") as partial:
                partial.write_text("new")
            return set(os.listdir(tmp_path))

        stays = {"a", f".ab{theirs[2:]}", elsewhere}
        assert write() == {theirs, *stays}
        other.kill()
        other.wait()
        assert write() == stays
