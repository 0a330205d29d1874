"""Intervals count optimizer steps, whatever a step holds and wherever a run was resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from blockwright.registry import ConfigError
from blockwright.training.cadence import logs_now
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import Constant
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.making import Setup


class Steps(L.Callback):
    """The optimizer steps after which there was a validation, and those that were logged."""

    def __init__(self) -> None:
        self.validated: list[int] = []
        self.logged: list[int] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if logs_now(trainer):
            self.logged.append(trainer.global_step)


@pytest.fixture
def steps(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Steps]:
    """Trains on epochs of five batches."""

    def train(
        interval: int | float | None, ckpt_path: Path | None = None, save: Path | None = None, **settings: Any
    ) -> Steps:
        seen, tokens = Steps(), torch.arange(13)[None]
        place = torch.arange(12)[None]
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": place, "n_bytes": torch.tensor([12])}
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        ours = {"accelerator": "cpu", "log_every_n_steps": 2, "num_sanity_val_steps": 0, "accumulate_grad_batches": 2}
        counted = {"check_val_every_n_epoch": None, "max_epochs": -1, "val_check_interval": interval}
        trainer = L.Trainer(**{**quiet, **ours, **counted, **settings}, default_root_dir=tmp_path, callbacks=[seen])
        train, val = (DataLoader([batch] * n, batch_size=None) for n in (5, 1))
        task = CausalLM(Setup(tiny(n_layers=1), AdamW(), Constant(1)))
        trainer.fit(task, train, val, ckpt_path=ckpt_path, weights_only=True)
        if save:
            trainer.save_checkpoint(save)
        return seen

    return train


def test_intervals_count_steps_over_the_whole_run(steps: Callable[..., Steps]) -> None:
    seen = steps(2, max_steps=8)  # an epoch is three steps, of two batches, two and one
    assert seen.validated == [2, 4, 6, 8]
    assert seen.logged == [2, 4, 6, 8]


@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_run_validates_when_it_would_have(steps: Callable[..., Steps], tmp_path: Path, stop: int) -> None:
    first = steps(2, max_steps=stop, save=tmp_path / "last.ckpt")
    rest = steps(2, max_steps=8, ckpt_path=tmp_path / "last.ckpt")
    assert first.validated + rest.validated == [2, 4, 6, 8]
    assert first.logged + rest.logged == [2, 4, 6, 8]


@pytest.mark.parametrize(("interval", "validated"), [(2, [2, 5]), (0.5, [1, 2, 3, 4, 5, 6])])
def test_intervals_within_an_epoch_begin_anew_in_each(steps: Any, interval: int | float, validated: list[int]) -> None:
    assert steps(interval, max_epochs=2, check_val_every_n_epoch=1).validated == validated


def test_interval_that_no_epoch_reaches_is_refused(steps: Callable[..., Steps]) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.val_check_interval.*an epoch has 3"):
        steps(4, max_epochs=2, check_val_every_n_epoch=1)


def test_without_accumulation_steps_are_batches(steps: Callable[..., Steps]) -> None:
    seen = steps(2, max_steps=6, accumulate_grad_batches=1)
    assert seen.validated == seen.logged == [2, 4, 6]
    assert steps(None, max_steps=6).validated == []  # no interval means no validation while training
