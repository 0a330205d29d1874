"""Ranges and names of the trainer's settings, which no annotation of Lightning's holds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from blockwright.registry import ConfigError
from blockwright.training.configuration import trainer_settings

WRONG = {  # settings of the trainer that Lightning takes and fails on, or that mean nothing
    "max_steps": (0, math.nan),
    "max_epochs": (-2, 0),
    "limit_train_batches": (-1, 0, 1.5, math.nan),
    "limit_val_batches": (-1, 2.5),
    "overfit_batches": (-1,),
    "fast_dev_run": (-1,),
    "devices": (0, -5, "x", "0", [], [0, 0], [-1], None, 1.5, True),
    "num_nodes": (0,),
    "val_check_interval": (0.25, -1, "soon", math.inf),
    "check_val_every_n_epoch": (0,),
    "max_time": ("abc", 3),
    "accelerator": ("gpux",),
    "gradient_clip_algorithm": ("foo",),
    "profiler": ("foo",),
    "num_sanity_val_steps": (-2,),
    "strategy": ("ddp_spawn", "ddp_fork", "model_parallel", "dpp", None, {}),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_setting_of_the_trainer_that_cannot_be_right_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        trainer_settings.check({"check_val_every_n_epoch": None, key: value}, train=True)
    assert caught.value.path == f"trainer.{key}" and caught.value.remedy


RIGHT = {
    "max_steps": (-1, 5),
    "max_epochs": (-1, None, 3),
    "limit_val_batches": (0, 0.5, 1.0, 7, None),
    "devices": (1, 2, "auto", -1, "-1", [0, 2], "0,2", "3"),
    "val_check_interval": (1, 1000, None, "00:00:10:00", {"minutes": 5}),
    "max_time": ("00:12:00:00", {"hours": 1}, None),
    "accelerator": ("cpu", "auto", "mps"),
    "strategy": ("auto", "ddp", "ddp_find_unused_parameters_true", "deepspeed_stage_2", {"_target_": "x"}),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in RIGHT.items() for value in values])
def test_setting_of_the_trainer_that_may_be_right_is_let_through(key: str, value: Any) -> None:
    trainer_settings.check({"check_val_every_n_epoch": None, key: value}, train=True)


def test_share_of_an_epoch_between_validations_is_right_where_epochs_are_counted() -> None:
    trainer_settings.check({"check_val_every_n_epoch": 1, "val_check_interval": 0.25}, train=True)
    with pytest.raises(ConfigError, match="at most 1"):
        trainer_settings.check({"check_val_every_n_epoch": 1, "val_check_interval": 1.5}, train=True)
