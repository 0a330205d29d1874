"""The newest undamaged checkpoint is found; a run resumes only from its own past, and writes over no other's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockwright.blocks.checkpoint import manifest
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.atomic import write_file
from blockwright.training.checkpoints.find import good, newest, refuse_overwriting, settled
from blockwright.training.checkpoints.record import peek
from blockwright.training.checkpoints.resume import check_changes, resolve_checkpoint
from blockwright.training.configuration.run import Run
from blockwright.training.jobs import SWEEP


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


def test_best_checkpoint_counts_where_there_is_no_other(runs: Path) -> None:
    """A run that was killed within the end of its first validation has only that."""
    best = runs / "c" / "checkpoints" / "best-1.ckpt"
    write_file({"run": "c", "step": 1}, best)
    write_file({"run": "b", "step": 1}, runs / "b" / "checkpoints" / "best-1.ckpt")
    assert newest(runs) == newest(runs / "c") == best
    assert newest(runs / "b") == runs / "b" / "checkpoints" / "last.ckpt"


def test_damaged_ones_are_skipped_with_a_warning_each(tmp_path: Path, runs: Path) -> None:
    older, last = (runs / run / "checkpoints" / "last.ckpt" for run in "ab")
    assert newest(runs) == good(last) == last and newest(tmp_path / "nothing") is None
    damage(last)
    with pytest.warns(UserWarning, match=r"skipped: .*/b/checkpoints/last\.ckpt is damaged"):
        assert newest(runs) == good(last) == last.with_name("last.previous.ckpt")
    damage(last.with_name("last.previous.ckpt"))
    with pytest.warns(UserWarning, match="is damaged"):
        assert newest(runs) == older
    write_file({"step": 3}, best := older.with_name("best.ckpt"))
    for file in (best, older, older.with_name("last.previous.ckpt")):
        damage(file)
    with pytest.warns(UserWarning, match="skipped"):
        assert newest(runs) is None and good(best) is None  # a best one has no predecessor


def test_folder_of_shards_is_one_too(runs: Path) -> None:
    folder = runs / "c" / "checkpoints" / "last.ckpt"
    folder.mkdir(parents=True)
    (folder / "shard").write_text("x")
    manifest.seal_folder(folder)
    assert newest(runs) == folder
    (folder / "shard").write_text("y")
    with pytest.warns(UserWarning, match="the bytes of shard"):
        assert newest(runs) == runs / "b" / "checkpoints" / "last.ckpt"


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


LAST = "checkpoints/last.ckpt"


@pytest.fixture
def found(ours: dict[str, Any]) -> Callable[[Run], Path | None]:
    def find(run: Run) -> Path | None:
        path = resolve_checkpoint(settled(run), lambda: ours)
        return Path(path) if path else None

    return find


AUTO, NEWEST = {"auto_resume": True}, {"ckpt_path": "last"}

EITHER = pytest.mark.parametrize("asked", [AUTO, NEWEST], ids=["auto_resume", "last"])


@EITHER
def test_folder_of_the_run_itself_or_where_it_keeps_checkpoints_comes_before_newer_runs(
    asked: Any, leave: Leave, at: At, found: Any, tmp_path: Path
) -> None:
    own, kept = leave(tmp_path / "own" / LAST, age=60), leave(tmp_path / "scratch/last.ckpt", age=60)
    leave(tmp_path / "logs/mine/runs/newer" / LAST)
    assert found(at(run="own", **asked)) == own
    assert found(at(dirpath=tmp_path / "scratch", **asked)) == kept


@EITHER
def test_newest_run_of_the_same_configuration_is_resumed_and_newer_others_are_named(
    asked: Any, leave: Leave, at: At, found: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = leave(tmp_path / "logs/mine/runs/a" / LAST, {"trainer.max_steps": 3}, age=60)  # only shorter
    leave(tmp_path / "logs/mine/multiruns/b/0" / LAST, {"seed": 7})
    caplog.set_level(logging.INFO)
    assert found(at(**asked)) == same
    assert "a newer one" in caplog.text and "seed was 7, is 0" in caplog.text


def test_automatic_start_takes_no_run_of_another_configuration(
    leave: Leave, at: At, found: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = leave(tmp_path / "logs/mine/runs/a" / LAST, {"optimizer.lr": 0.5})
    leave(tmp_path / "logs/others/runs/a" / LAST)  # of another task
    assert found(at(**AUTO)) is None
    assert "a new run" in caplog.text and "optimizer.lr was 0.5, is 0.01" in caplog.text
    assert found(at(**NEWEST)) == other  # asked for, and shown as a table


def test_automatic_start_is_refused_where_another_configuration_left_its_checkpoints(
    leave: Leave, at: At, found: Any, tmp_path: Path
) -> None:
    leave(tmp_path / "scratch/last.ckpt", {"seed": 7})
    with pytest.raises(ConfigError, match=r"seed was 7, is 0.*ckpt_path=.*scratch/last\.ckpt"):
        found(at(dirpath=tmp_path / "scratch", **AUTO))


def test_job_of_a_sweep_looks_in_its_own_folder_only(leave: Leave, at: At, found: Any, tmp_path: Path) -> None:
    sweep = tmp_path / "logs/mine/multiruns/x"
    leave(sweep / "0" / LAST)
    (sweep / SWEEP).write_text("{}")
    job = at(run="logs/mine/multiruns/x/1", **AUTO)
    assert found(job) is None
    with pytest.raises(ConfigError, match="a sweep's job resumes only from its own"):
        found(replace(job, auto_resume=False, **NEWEST))
    own = leave(sweep / "1" / LAST, age=60)
    assert found(job) == own
    leave(tmp_path / "scratch/last.ckpt")
    kept = leave(tmp_path / "scratch/x/1/last.ckpt", age=90)
    assert found(at(run="logs/mine/multiruns/x/1", dirpath=tmp_path / "scratch", **AUTO)) == kept


def test_checkpoint_of_an_older_version_is_compared_by_model_and_seed(
    leave: Leave, at: At, found: Any, ours: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = {"configuration": None, "hyper_parameters": {"model": ours["model"], "seed": 0}}
    old = leave(tmp_path / "logs/mine/runs/a" / LAST, **known)
    assert found(at(**AUTO)) == old
    past = peek(old)
    assert past and not past.complete
    check_changes(str(old), past, ours, at())
    assert "holds no configuration, so only its model and seed are compared" in caplog.text
    old.unlink()
    leave(old, **{**known, "hyper_parameters": {"model": ours["model"], "seed": 3}})
    assert found(at(**AUTO)) is None


def test_changes_are_a_table_before_the_first_step(
    leave: Leave, at: At, ours: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave(tmp_path / "x.ckpt", {"seed": 7, "optimizer.lr": 0.5, "data.sequence_length": 16})
    past = peek(path)
    assert past is not None
    check_changes(str(path), past, ours, at())
    lines = [line.split() for line in caplog.text.splitlines()]
    for row in (["seed", "7", "0"], ["optimizer.lr", "0.5", "0.01"], ["data.sequence_length", "16", "32"]):
        assert row in lines
    caplog.clear()
    same = leave(path.with_name("same.ckpt"))
    with caplog.at_level(logging.INFO):
        check_changes(str(same), peek(same), ours, at())  # type: ignore[arg-type]
    assert f"resumes from {same} at step" in caplog.text and "changed" not in caplog.text


def test_weights_that_would_mean_something_else_are_refused_unless_allowed(
    leave: Leave, at: At, ours: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave(tmp_path / "x.ckpt", {"model.position.theta": 5e5})
    past = peek(path)
    assert past is not None
    with pytest.raises(ConfigError, match=r"model\.position\.theta was 500000\.0, is 10000\.0.*resume\.changed=allow"):
        check_changes(str(path), past, ours, at())
    check_changes(str(path), past, ours, at(resume={"changed": "allow"}))
    assert "model.position.theta" in caplog.text


def test_another_length_says_what_the_learning_rate_does(
    leave: Leave, at: At, ours: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rates = {"lr_schedulers": [{"_last_lr": [0.001], "base_lrs": [0.01]}], "global_step": 6}
    path = leave(tmp_path / "x.ckpt", **rates)
    ours["trainer"]["max_steps"] = 18
    check_changes(str(path), peek(path), ours, at(trainer=ours["trainer"]))  # type: ignore[arg-type]
    assert "learning rate at step 6: 0.75 of its peak, in the checkpoint 0.10" in caplog.text
    assert "the schedule now ends at step 18, there at 6" in caplog.text
