"""Which exceptions are mistakes of a user, and the life of a job: what it claims, how it ends, what a sweep learns."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockwright.registry import REFUSED, ConfigError
from blockwright.training.claims import LOCK, only_writer
from blockwright.training.entry.hydra_job import Job
from blockwright.training.entry.main import check_folders, check_options, refusal_of
from blockwright.training.jobs import HOST, STOP, SWEEP
from blockwright.training.result import SIGNALS, Diverged, Interrupted, Pruned, Result, stoppable


def test_option_that_hydra_does_not_have_is_refused_and_its_own_pass() -> None:
    for arguments, remedy in (
        *((["--lr=0.1"], "lr=VALUE"), (["--model", "tiny"], "model=VALUE")),
        *((["--cfg", "nope"], "--help"), (["-z"], "--help")),
    ):
        with pytest.raises(ConfigError) as caught:
            check_options(arguments)
        assert remedy in caught.value.remedy
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
    for error in (FileNotFoundError(2, "No such file or directory", "x"), PermissionError("no file"), KeyError("x")):
        assert refusal_of(error, []) is None


def test_folder_whose_name_is_no_string_is_refused_before_it_is_made() -> None:
    for value in ("1", "-2.5", "1e3", "null", "true", ""):
        with pytest.raises(ConfigError) as caught:
            check_folders(["model=tiny", f"paths.log_dir={value}"])
        assert caught.value.path == "paths.log_dir" and "paths.log_dir=" in caught.value.remedy
    check_folders(["paths.log_dir=./1", "paths.log_dir='1'", "paths.data_dir=1a", "seed=1", "paths.log_dir=2026-11-29"])


@pytest.mark.slow
def test_command_leaves_no_folder_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "blockwright.train", "paths.log_dir=1"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == REFUSED and "paths.log_dir = 1" in ended.stderr and not any(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a sweep's job."""
    (tmp_path / SWEEP).write_text(json.dumps({"direction": "minimize"}))
    (tmp_path / "3").mkdir()
    return tmp_path / "3"


@pytest.mark.parametrize(("direction", "worst"), [("minimize", math.inf), ("maximize", -math.inf)])
def test_failure_in_a_multirun_is_a_row_with_the_worst_value(folder: Path, direction: str, worst: float) -> None:
    (folder.parent / SWEEP).write_text(json.dumps({"direction": direction}))
    for error, status, reason in (
        (ConfigError("seed", -1, "is negative", "Write seed=0"), "failed", "seed = -1: is negative. Write seed=0"),
        (RuntimeError("no"), "failed", "RuntimeError: no"),
        (Diverged(3, "the loss is NaN"), "diverged", "diverged at step 3: the loss is NaN"),
    ):
        with Job(folder, swept=True) as job:
            raise error
        result = Result.read(folder)
        assert (result.status, result.reason, job.value) == (status, reason, worst)


def test_pruned_trial_keeps_its_value(folder: Path) -> None:
    with Job(folder, swept=True) as job:
        raise Pruned(4, "val/loss", 2.5)
    assert job.value == 2.5 and Result.read(folder).metrics == {"val/loss": 2.5}


def test_failure_of_a_job_that_runs_by_itself_reaches_the_caller(folder: Path) -> None:
    for error in (ConfigError("seed", -1, "x", "y"), RuntimeError(), Diverged(1, ""), Pruned(1, "", 0)):
        with pytest.raises(type(error)), Job(folder, swept=False):
            raise error
        assert not Result.read(folder).ended and not (folder / LOCK).exists()


def test_folder_is_locked_while_the_run_lasts(folder: Path) -> None:
    with Job(folder, swept=True):
        with only_writer(folder) as alone:
            assert not alone
        with Job(folder, swept=True), Job(folder, swept=False):  # the sweep is locked as a whole
            pass
    assert not (folder / LOCK).exists()


def test_run_alone_refuses_the_folder_of_another_unless_it_is_a_further_process_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job(tmp_path, swept=False):
        with pytest.raises(ConfigError) as caught, Job(tmp_path, swept=False):
            pass
        monkeypatch.setenv("LOCAL_RANK", "1")
        with Job(tmp_path, swept=False):
            pass
    assert caught.value.path == "hydra.run.dir"


def test_host_of_a_sweep_locks_its_jobs_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST, "kubernetes")
    with Job(folder, swept=False), only_writer(folder) as alone:
        assert alone


def test_stopped_sweep_is_named_and_starts_no_further_job(folder: Path) -> None:
    with pytest.raises(Interrupted) as caught, Job(folder, swept=True):
        raise Interrupted(None, 0, signal.SIGINT)
    assert caught.value.sweep == folder.parent
    (folder.parent / STOP).touch()
    with pytest.raises(Interrupted) as caught, Job(folder, swept=True):
        pass
    assert caught.value.sweep == folder.parent
    with Job(folder, swept=False):  # started by hand
        pass


@pytest.mark.xdist_group("programs")
def test_folder_of_a_run_that_still_runs_is_refused(train_py: Any, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"):
        done = train_py(*small, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 64 and "Traceback" not in done.stderr
    assert f"error: hydra.run.dir = {tmp_path}/run\n" in done.stderr


@pytest.mark.parametrize(("later", "named"), [(signal.SIGTERM, 7), (signal.SIGUSR1, 7), (signal.SIGINT, 0)])
def test_a_run_that_is_stopping_names_its_checkpoint_whatever_slurm_sends_then(later: int, named: int) -> None:
    with pytest.raises(Interrupted) as caught, stoppable():
        try:
            raise Interrupted(Path("last.ckpt"), 7, signal.SIGUSR1)
        finally:  # as Lightning's teardown
            signal.raise_signal(later)
    assert caught.value.step == named


def test_a_signal_to_a_run_that_has_stopped_does_not_change_its_exit_code() -> None:
    came: list[int] = []
    before = {signum: signal.signal(signum, lambda signum, _: came.append(signum)) for signum in SIGNALS}
    try:
        for error, expected in ((Interrupted(None, 0, signal.SIGTERM), [signal.SIGINT]), (KeyError(), [*SIGNALS])):
            came.clear()
            with pytest.raises(type(error)), stoppable():
                raise error
            for signum in SIGNALS:  # while the process ends
                signal.raise_signal(signum)
            assert came == expected
            for signum in SIGNALS:
                signal.signal(signum, lambda signum, _: came.append(signum))
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
