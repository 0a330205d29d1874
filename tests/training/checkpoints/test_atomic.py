"""A checkpoint is at its path whole or not at all, and the one before it stays until it has been verified."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.checkpoint import manifest
from blockwright.blocks.checkpoint.read import read_file
from blockwright.registry import ConfigError
from blockwright.training import claims
from blockwright.training.checkpoints import atomic
from blockwright.training.checkpoints.atomic import clean, partial_of, put_in_place, refused_if_unwritable, write_file


def step(path: Path) -> int:
    return read_file(path)["step"]


def test_file_is_sealed_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_file({"step": 1}, tmp_path / "deep" / "best.ckpt")
    assert manifest.check(tmp_path / "deep" / "best.ckpt") and step(tmp_path / "deep" / "best.ckpt") == 1
    write_file({"step": 2}, tmp_path / "deep" / "best.ckpt")
    assert step(tmp_path / "deep" / "best.ckpt") == 2
    assert os.listdir(tmp_path / "deep") == ["best.ckpt"]


def test_last_keeps_its_predecessor(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_file({"step": number}, tmp_path / "last.ckpt")
    assert step(tmp_path / "last.ckpt") == 3 and step(tmp_path / "last.previous.ckpt") == 2
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "last.previous.ckpt"]


def test_a_path_that_its_maker_has_claimed_is_written_as_it_is(tmp_path: Path) -> None:
    """As a strategy's own file is; it would wait for itself if it claimed the path again."""
    partial = partial_of(tmp_path / "last.ckpt")
    with refused_if_unwritable(tmp_path / "last.ckpt", partial):
        write_file({"step": 1}, partial)
        assert manifest.check(partial)
        put_in_place(partial, tmp_path / "last.ckpt")
    assert step(tmp_path / "last.ckpt") == 1 and os.listdir(tmp_path) == ["last.ckpt"]


def test_folder_takes_the_place_of_a_folder_and_of_a_file(tmp_path: Path) -> None:
    write_file({"step": 1}, tmp_path / "last.ckpt")
    for number in (2, 3):
        partial = partial_of(tmp_path / "last.ckpt")
        partial.mkdir()
        (partial / "shard").write_text(str(number))
        manifest.seal_folder(partial)
        put_in_place(partial, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt" / "shard").read_text() == "3"
    assert (tmp_path / "last.previous.ckpt" / "shard").read_text() == "2"
    write_file({"step": 4}, tmp_path / "last.ckpt")
    assert step(tmp_path / "last.ckpt") == 4 and (tmp_path / "last.previous.ckpt" / "shard").read_text() == "3"
    assert len(os.listdir(tmp_path)) == 2


def test_without_hard_links_it_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuses)
    for number in (1, 2):
        write_file({"step": number}, tmp_path / "last.ckpt")
    assert step(tmp_path / "last.ckpt") == 2 and step(tmp_path / "last.previous.ckpt") == 1


def test_what_was_written_wrongly_takes_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hands back other bytes than it was given."""
    write_file({"step": 1}, tmp_path / "last.ckpt")

    def corrupts(descriptor: int) -> None:
        (partial,) = tmp_path.glob(".*.partial")
        data = bytearray(partial.read_bytes())
        data[len(data) // 2] ^= 1
        partial.write_bytes(data)

    monkeypatch.setattr(atomic, "_forget_cached", corrupts)
    with pytest.raises(ConfigError, match="what was read back differs from what was written"):
        write_file({"step": 2}, tmp_path / "last.ckpt")
    assert step(tmp_path / "last.ckpt") == 1 and os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("room", [0, 100, 2000, 9000])
def test_full_disk_is_one_refusal_and_leaves_the_last_good_one(room: int, tmp_path: Path, monkeypatch: Any) -> None:
    write_file({"step": 1}, tmp_path / "last.ckpt")
    passed = manifest.Sealing._pass

    def fills(self: manifest.Sealing, data: bytes) -> None:
        if self._file.tell() + len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        passed(self, data)

    monkeypatch.setattr(manifest.Sealing, "_pass", fills)
    with pytest.raises(ConfigError) as caught:
        write_file({"step": 2, "weights": torch.zeros(4000)}, tmp_path / "last.ckpt")
    assert "No space left on device" in caught.value.rule and "are intact" in caught.value.remedy
    assert step(tmp_path / "last.ckpt") == 1 and os.listdir(tmp_path) == ["last.ckpt"]


def dead(folder: Path) -> str:
    """An owner that this kernel has seen ending amid its writing."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = claims.new_owner()
    (folder / f".{owner}.lock").touch()
    return owner


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    write_file({"step": 1}, folder / "last.ckpt")
    (folder / f".last.ckpt.{dead(folder)}.partial").write_text("half")
    (folder / f".shards.ckpt.{dead(folder)}.partial.part").mkdir()
    elsewhere = folder / ".last.ckpt.another-machine-01234567-0123456789ab.partial"
    elsewhere.write_text("perhaps being written")
    for name in (".best.ckpt.another-machine-01234567-ba9876543210.partial", ".best.ckpt.older-version-18.partial"):
        (folder / name).write_text("surely not")
        os.utime(folder / name, (0, 0))
    foreign = folder / ".notes.old"
    foreign.write_text("another's")
    os.utime(foreign, (0, 0))
    mine = partial_of(folder / "last.ckpt")
    with refused_if_unwritable(folder / "last.ckpt", mine):
        mine.write_text("being written")
        os.utime(mine, (0, 0))
        assert len(clean(tmp_path)) == 4
        assert {p for p in folder.iterdir() if p.suffix != ".lock"} == {folder / "last.ckpt", mine, elsewhere, foreign}
    assert set(folder.iterdir()) == {folder / "last.ckpt", elsewhere, foreign}


def test_writer_in_another_pid_namespace_keeps_its_partial(tmp_path: Path) -> None:
    """A container of the same host name, whose process numbers mean nothing here; once it is killed, it is cleaned."""
    folder = tmp_path / "run" / "checkpoints"
    code = f"""
import pathlib, time
from blockwright.training.claims import claimed, new_owner
folder, owner = pathlib.Path({str(folder)!r}), new_owner()
folder.mkdir(parents=True)
with claimed(folder, owner):
    (folder / f".last.ckpt.{{owner}}.partial").write_text("half")
    (folder / f".last.ckpt.{{owner}}.old").write_text("the one before")
    print("writing", flush=True)
    time.sleep(60)
"""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        unshare = []  # not allowed here: then a process of this namespace
    command = [*unshare, sys.executable, "-c", code]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
        assert clean(tmp_path) == []
    finally:
        writer.kill()
        writer.communicate()
    assert len(clean(tmp_path)) == 2
    assert os.listdir(folder) == ["last.ckpt"] and (folder / "last.ckpt").read_text() == "the one before"


def test_checkpoint_that_was_being_replaced_gets_its_place_back(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    write_file({"step": 1}, folder / "last.ckpt")
    os.replace(folder / "last.ckpt", folder / f".last.ckpt.{dead(folder)}.old")
    clean(tmp_path)
    assert step(folder / "last.ckpt") == 1
    write_file({"step": 2}, tmp_path / "x.ckpt")
    os.replace(tmp_path / "x.ckpt", folder / f".last.ckpt.{dead(folder)}.old")
    clean(tmp_path)
    assert step(folder / "last.ckpt") == 1 and os.listdir(folder) == ["last.ckpt"]
