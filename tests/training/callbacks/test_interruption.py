"""``last.ckpt`` is where a run resumes. Whole runs that are stopped and resumed: tests/test_resume.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from blockwright.training.callbacks.interruption import Interrupted, Interruption
from blockwright.training.entry.execute import conclude

Fit = Callable[..., L.Trainer]


class Signals(L.Callback):
    """Sends signals to this process before a batch is computed, and counts what others would have seen."""

    def __init__(self, at: int, *signums: int) -> None:
        self.at, self.signums, self.ends = at, signums, 0

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        for signum in self.signums if batch_idx == self.at else ():
            os.kill(os.getpid(), signum)

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends += 1

    def state_dict(self) -> dict[str, Any]:
        return {"ends": self.ends}


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture
def handlers() -> Any:
    """The handlers before and after are the same."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_signal_stops_after_the_step_with_the_state_of_all_callbacks(fit: Fit, tmp_path: Path, handlers: None) -> None:
    """Of those behind it too."""
    signum = signal.SIGTERM
    with pytest.raises(Interrupted) as caught:
        fit(callbacks=[Interruption(), Signals(2, signum)], enable_checkpointing=True)
    told = caught.value
    assert (told.step, told.signum, told.checkpoint) == (3, signum, tmp_path / "checkpoints" / "last.ckpt")
    assert saved(tmp_path)["global_step"] == 3
    assert saved(tmp_path)["callbacks"]["Signals"] == {"ends": 3}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as the only task of a job of Slurm; the file that lists what scontrol is asked for."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    numbers = {"JOB_ID": 77, "NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NNODES": 1}
    for name, value in {**numbers, "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return tmp_path / "asked"


@pytest.mark.slow
@pytest.mark.parametrize(("array", "asked"), [(None, "requeue 77\n"), ("70", "requeue 70_3\n")])
def test_signal_of_slurm_queues_the_job_again_and_leaves_one_checkpoint(
    fit: Fit, tmp_path: Path, slurm: Path, array: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(Interrupted):
        fit(callbacks=[Interruption(), Signals(2, signal.SIGUSR1)], enable_checkpointing=True)
    assert slurm.read_text() == asked and saved(tmp_path)["global_step"] == 3
    assert list(tmp_path.rglob("*.ckpt")) == [tmp_path / "checkpoints" / "last.ckpt"]


@pytest.mark.slow
def test_figures_of_a_run_are_of_its_weights_and_not_of_what_an_earlier_job_has_left(
    fit: Fit, tmp_path: Path, slurm: Path
) -> None:
    trainer = fit(limit_val_batches=1)
    task, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    trained = conclude(trainer, task, data, test=False)
    for factor in (1.5, 1 / 1.5):
        with torch.no_grad():
            torch._foreach_mul_([*task.parameters()], factor)
        if factor > 1:
            trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    assert conclude(trainer, task, data, test=False)["val/loss"] == pytest.approx(trained["val/loss"], rel=1e-6)


def test_second_interrupt_does_not_wait_for_the_step(fit: Fit, tmp_path: Path, handlers: None) -> None:
    with pytest.raises(SystemExit) as caught:
        fit(callbacks=[Interruption(), Signals(2, signal.SIGINT, signal.SIGINT)], enable_checkpointing=True)
    assert caught.value.code == 130
    assert not (tmp_path / "checkpoints").exists()


def test_second_sigterm_waits_for_the_step(fit: Fit, tmp_path: Path, handlers: None) -> None:
    with pytest.raises(Interrupted):
        fit(callbacks=[Interruption(), Signals(2, signal.SIGTERM, signal.SIGTERM)], enable_checkpointing=True)
    assert saved(tmp_path)["global_step"] == 3


def test_last_step_is_kept_without_a_validation_on_it(fit: Fit, tmp_path: Path, handlers: None) -> None:
    settings = {"enable_checkpointing": True, "limit_val_batches": 1, "val_check_interval": 2}
    keeper = ModelCheckpoint(tmp_path / "kept", filename="best", monitor="val/loss")
    fit("trainer.max_steps=3", callbacks=[keeper, Interruption()], **settings)
    last = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)  # beside the best one
    assert last["global_step"] == 3
    assert (tmp_path / "checkpoints").is_symlink() and saved(tmp_path)["global_step"] == 3  # found from the run
    assert torch.load(tmp_path / "kept" / "best.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_leftovers_are_cleaned_where_the_checkpoints_are_and_nowhere_above(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockwright.training.callbacks import interruption

    cleaned: list[Path] = []
    monkeypatch.setattr(interruption, "clean", cleaned.append)
    monkeypatch.setattr(interruption, "clean_folder", cleaned.append)
    keeper = ModelCheckpoint(tmp_path / "kept", filename="best")
    fit("trainer.max_steps=1", callbacks=[keeper, Interruption()], enable_checkpointing=True)
    assert cleaned == [tmp_path.parent, tmp_path / "kept"]
