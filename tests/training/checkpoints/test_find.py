"""The newest checkpoint that is undamaged is found, with a word on each that is skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockwright.blocks.checkpoint import manifest
from blockwright.training.checkpoints.atomic import write_file
from blockwright.training.checkpoints.find import good, newest


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs of two saves each; b is the newer one."""
    for time, run in enumerate("ab"):
        for number in (0, 1):
            last = tmp_path / "runs" / run / "checkpoints" / "last.ckpt"
            write_file({"run": run, "step": number}, last)
            os.utime(last, (1000 * time + number, 1000 * time + number))
    return tmp_path / "runs"


def damage(path: Path) -> Path:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[200] ^= 4
    path.write_bytes(data)
    os.utime(path, (status.st_mtime, status.st_mtime))
    return path


def test_newest_is_the_last_of_the_newest_run(runs: Path) -> None:
    assert newest(runs) == runs / "b" / "checkpoints" / "last.ckpt"


def test_checkpoint_of_a_chosen_step_counts_where_nothing_newer_was_saved(runs: Path) -> None:
    """A run without validations that was killed has no other."""
    kept = runs / "c" / "checkpoints" / "step_8.ckpt"
    write_file({"run": "c", "step": 8}, kept)
    assert newest(runs) == newest(runs / "c") == kept
    os.utime(kept, (500, 500))
    assert newest(runs) == runs / "b" / "checkpoints" / "last.ckpt" and newest(runs / "c") == kept
    damage(kept)
    with pytest.warns(UserWarning, match=r"step_8\.ckpt is damaged"):
        assert newest(runs / "c") is None


def test_damaged_ones_are_skipped_with_a_warning_each(runs: Path) -> None:
    damage(runs / "b" / "checkpoints" / "last.ckpt")
    with pytest.warns(UserWarning, match=r"skipped: .*/b/checkpoints/last\.ckpt is damaged"):
        assert newest(runs) == runs / "b" / "checkpoints" / "last.previous.ckpt"
    damage(runs / "b" / "checkpoints" / "last.previous.ckpt")
    with pytest.warns(UserWarning, match="is damaged"):
        assert newest(runs) == runs / "a" / "checkpoints" / "last.ckpt"


def test_none_where_there_is_none(tmp_path: Path, runs: Path) -> None:
    assert newest(tmp_path / "nothing") is None
    for file in runs.rglob("*.ckpt"):
        damage(file)
    with pytest.warns(UserWarning, match="skipped"):
        assert newest(runs) is None


def test_named_one_that_is_damaged_gives_way_to_its_predecessor(runs: Path) -> None:
    last = runs / "a" / "checkpoints" / "last.ckpt"
    assert good(last) == last
    damage(last)
    with pytest.warns(UserWarning, match="skipped"):
        assert good(last) == last.with_name("last.previous.ckpt")


def test_best_has_no_predecessor(runs: Path) -> None:
    best = runs / "a" / "checkpoints" / "best.ckpt"
    write_file({"step": 3}, best)
    damage(best)
    with pytest.warns(UserWarning, match="skipped"):
        assert good(best) is None


def test_folder_of_shards_is_one_too(runs: Path) -> None:
    folder = runs / "c" / "checkpoints" / "last.ckpt"
    folder.mkdir(parents=True)
    (folder / "shard").write_text("x")
    manifest.seal_folder(folder)
    assert newest(runs) == folder
    (folder / "shard").write_text("y")
    with pytest.warns(UserWarning, match="the bytes of shard"):
        assert newest(runs) == runs / "b" / "checkpoints" / "last.ckpt"
