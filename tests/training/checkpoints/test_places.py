"""A run never writes over the checkpoints of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.places import SWEEP, place_of, refuse_overwriting, settle

Leave, Plain = Callable[..., Path], Callable[..., dict[str, Any]]


@pytest.mark.parametrize("name", ["last.ckpt", "last.previous.ckpt", "best.ckpt"])
def test_new_run_is_refused_where_another_left_its_checkpoints(
    name: str, leave: Leave, plain: Plain, tmp_path: Path
) -> None:
    file = leave(tmp_path / "scratch" / name)
    given = plain(dirpath=tmp_path / "scratch")
    with pytest.raises(ConfigError) as caught:
        refuse_overwriting(given, settle(given))
    assert caught.value.path == "callbacks.checkpoint.dirpath" and f"ckpt_path={file}" in caught.value.remedy
    elsewhere = leave(tmp_path / "elsewhere" / "last.ckpt")
    with pytest.raises(ConfigError):  # resuming from a third place overwrites it all the same
        refuse_overwriting({**given, "ckpt_path": str(elsewhere)}, settle(given))
    refuse_overwriting({**given, "ckpt_path": str(file)}, settle(given))


def test_new_run_in_the_folder_of_another_is_refused(leave: Leave, plain: Plain, tmp_path: Path) -> None:
    leave(tmp_path / "run/checkpoints/last.ckpt")
    with pytest.raises(ConfigError) as caught:
        refuse_overwriting(plain(run="run"), settle(plain(run="run")))
    assert caught.value.path == "hydra.run.dir"


def test_what_writes_nothing_and_what_is_not_written_over_is_let_through(
    leave: Leave, plain: Plain, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "kept").mkdir(parents=True)
    leave(scratch / "of_another.ckpt")
    last = leave(scratch / "last.ckpt")
    whole = last.read_bytes()
    last.write_bytes(whole[:200] + bytes([whole[200] ^ 4]) + whole[201:])
    with pytest.warns(UserWarning, match="skipped"):
        refuse_overwriting(plain(dirpath=scratch), settle(plain(dirpath=scratch)))
    leave(last)
    (scratch / "last.previous.ckpt").unlink()
    for harmless in ({"train": False}, {"trainer": {"dry_run": True}}, {"trainer": {"fast_dev_run": True}}):
        given = plain(dirpath=scratch, **harmless)
        refuse_overwriting(given, settle(given))


def test_jobs_of_a_sweep_that_name_one_folder_get_one_each(plain: Plain, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / SWEEP).write_text("{}")
    jobs = [plain(run=f"sweep/{n}", dirpath=tmp_path / "scratch") for n in (0, 1)]
    for n, job in enumerate(jobs):
        assert settle(job).checkpoints == tmp_path / "scratch" / "sweep" / str(n)
        assert job["callbacks"]["checkpoint"]["dirpath"] == str(tmp_path / "scratch" / "sweep" / str(n))
        assert place_of(job).checkpoints == tmp_path / "scratch" / "sweep" / str(n)
    own = plain(run="sweep/2")
    assert settle(own).checkpoints == sweep / "2" / "checkpoints"


def test_run_without_a_keeper_keeps_its_checkpoints_in_its_folder(plain: Plain, tmp_path: Path) -> None:
    for callbacks in ({}, None, {"checkpoint": None}):
        assert settle(plain(run="run", callbacks=callbacks)).checkpoints == tmp_path / "run" / "checkpoints"
