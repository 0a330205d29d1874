"""A run never writes over the checkpoints of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.places import refuse_overwriting, settled
from blockwright.training.configuration.run import Run
from blockwright.training.jobs import SWEEP

Leave, At = Callable[..., Path], Callable[..., Run]


@pytest.mark.parametrize("name", ["last.ckpt", "last.previous.ckpt", "best.ckpt"])
def test_new_run_is_refused_where_another_left_its_checkpoints(name: str, leave: Leave, at: At, tmp_path: Path) -> None:
    file = leave(tmp_path / "scratch" / name)
    given = at(dirpath=tmp_path / "scratch")
    with pytest.raises(ConfigError) as caught:
        refuse_overwriting(given)
    assert caught.value.path == "callbacks.checkpoint.dirpath" and f"ckpt_path={file}" in caught.value.remedy
    elsewhere = leave(tmp_path / "elsewhere" / "last.ckpt")
    with pytest.raises(ConfigError):  # resuming from a third place overwrites it all the same
        refuse_overwriting(replace(given, ckpt_path=str(elsewhere)))
    refuse_overwriting(replace(given, ckpt_path=str(file)))


def test_new_run_in_the_folder_of_another_is_refused(leave: Leave, at: At, tmp_path: Path) -> None:
    leave(tmp_path / "run/checkpoints/last.ckpt")
    with pytest.raises(ConfigError) as caught:
        refuse_overwriting(at(run="run"))
    assert caught.value.path == "hydra.run.dir"


def test_what_writes_nothing_and_what_is_not_written_over_is_let_through(leave: Leave, at: At, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "kept").mkdir(parents=True)
    leave(scratch / "of_another.ckpt")
    last = leave(scratch / "last.ckpt")
    whole = last.read_bytes()
    last.write_bytes(whole[:200] + bytes([whole[200] ^ 4]) + whole[201:])
    with pytest.warns(UserWarning, match="skipped"):
        refuse_overwriting(at(dirpath=scratch))
    leave(last)
    (scratch / "last.previous.ckpt").unlink()
    for harmless in ({"train": False}, {"trainer": {"dry_run": True}}, {"trainer": {"fast_dev_run": True}}):
        given = at(dirpath=scratch, **harmless)
        refuse_overwriting(given)


def test_jobs_of_a_sweep_that_name_one_folder_get_one_each(at: At, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / SWEEP).write_text("{}")
    for n in (0, 1):
        job = at(run=f"sweep/{n}", dirpath=tmp_path / "scratch")
        assert settled(job).checkpoints == tmp_path / "scratch" / "sweep" / str(n)
        assert settled(job).callbacks["checkpoint"]["dirpath"] == str(tmp_path / "scratch" / "sweep" / str(n))
        assert job.checkpoints == tmp_path / "scratch"
    assert settled(at(run="sweep/2")).checkpoints == sweep / "2" / "checkpoints"


def test_run_without_a_keeper_keeps_its_checkpoints_in_its_folder(at: At, tmp_path: Path) -> None:
    for callbacks in ({}, {"checkpoint": None}):
        assert settled(at(run="run", callbacks=callbacks)).checkpoints == tmp_path / "run" / "checkpoints"
