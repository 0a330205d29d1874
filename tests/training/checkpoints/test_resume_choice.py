"""A run resumes only from its own past, and says what has changed since."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.places import settled
from blockwright.training.checkpoints.record import peek
from blockwright.training.checkpoints.resume import check_changes, resolve_checkpoint
from blockwright.training.configuration.run import Run
from blockwright.training.jobs import SWEEP

Leave, At = Callable[..., Path], Callable[..., Run]
LAST = "checkpoints/last.ckpt"


@pytest.fixture
def found(ours: dict[str, Any]) -> Callable[[Run], Path | None]:
    def find(run: Run) -> Path | None:
        path = resolve_checkpoint(settled(run), lambda: ours)
        return Path(path) if path else None

    return find


AUTO, NEWEST = {"auto_resume": True}, {"ckpt_path": "last"}


@pytest.mark.parametrize("asked", [AUTO, NEWEST], ids=["auto_resume", "last"])
def test_folder_of_the_run_itself_comes_before_newer_runs(
    asked: Any, leave: Leave, at: At, found: Any, tmp_path: Path
) -> None:
    own = leave(tmp_path / "own" / LAST, age=60)
    leave(tmp_path / "logs/mine/runs/newer" / LAST)
    assert found(at(run="own", **asked)) == own


@pytest.mark.parametrize("asked", [AUTO, NEWEST], ids=["auto_resume", "last"])
def test_checkpoints_are_looked_for_where_the_run_keeps_them(
    asked: Any, leave: Leave, at: At, found: Any, tmp_path: Path
) -> None:
    kept = leave(tmp_path / "scratch/last.ckpt", age=60)
    leave(tmp_path / "logs/mine/runs/newer" / LAST)
    assert found(at(dirpath=tmp_path / "scratch", **asked)) == kept


@pytest.mark.parametrize("asked", [AUTO, NEWEST], ids=["auto_resume", "last"])
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
