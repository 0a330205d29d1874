"""The life of a job: what it claims, how it ends, and what a sweep learns of it."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest

from blockwright.registry import ConfigError
from blockwright.training.claims import LOCK, only_writer
from blockwright.training.entry.job import Job
from blockwright.training.jobs import HOST, STOP, SWEEP
from blockwright.training.result import Result
from blockwright.training.stops import Diverged, Interrupted, Pruned


@pytest.fixture(params=["minimize", "maximize"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Of a sweep's job."""
    (tmp_path / SWEEP).write_text(json.dumps({"direction": request.param}))
    (tmp_path / "3").mkdir()
    return tmp_path / "3"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ConfigError("seed", -1, "is negative", "Write seed=0"), "failed", "seed = -1: is negative. Write seed=0"),
        (RuntimeError("no"), "failed", "RuntimeError: no"),
        (Diverged(3, "the loss is NaN"), "diverged", "diverged at step 3: the loss is NaN"),
    ],
)
def test_failure_in_a_multirun_is_a_row_with_the_worst_value(
    folder: Path, error: Exception, status: str, reason: str
) -> None:
    with Job(folder, swept=True) as job:
        raise error
    result = Result.read(folder)
    assert (result.status, result.reason) == (status, reason)
    assert job.value == (-math.inf if job.plan["direction"] == "maximize" else math.inf)


def test_pruned_trial_keeps_its_value(folder: Path) -> None:
    with Job(folder, swept=True) as job:
        raise Pruned(4, "val/loss", 2.5)
    assert job.value == 2.5 and Result.read(folder).metrics == {"val/loss": 2.5}


@pytest.mark.parametrize(
    "error", [ConfigError("seed", -1, "x", "y"), RuntimeError(), Diverged(1, ""), Pruned(1, "", 0)]
)
def test_failure_of_a_job_that_runs_by_itself_reaches_the_caller(folder: Path, error: Exception) -> None:
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
