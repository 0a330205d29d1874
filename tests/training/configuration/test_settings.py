"""Settings of packages, figures and the trainer, told or refused before a run trains."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.registry import ConfigError
from blockwright.training.configuration import figures, trainer_settings
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.parse import parse_settings
from blockwright.training.entry.preflight import NEEDS, preflight
from blockwright.training.jobs import SWEEP
from blockwright.training.metrics import TokenLoss


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what ``pip install blockwright`` brings."""
    for name in ("scipy", "jinja2", "wandb", "tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("core")
def test_default_run_names_both_extras_in_one_message(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        checked("callbacks=default", "logger=[default,wandb]")
    assert caught.value.path == "logger.tensorboard and logger.wandb"
    assert "pip install 'blockwright[tensorboard,wandb]'" in caught.value.remedy
    # Either package that Lightning takes for TensorBoard is enough.
    monkeypatch.setattr("blockwright.training.entry.preflight.has_package", lambda name: name == "tensorboardX")
    assert checked("callbacks=default", "logger=default")


def test_classes_are_those_of_conf() -> None:
    plain = compose_config(["callbacks=default", "logger=[default,wandb,mlflow]"], output_dir="x")
    nodes = [*plain.callbacks.values(), *plain.logger.values()]
    assert set(NEEDS) <= {node["_target_"] for node in nodes}


def test_jobs_of_a_sweep_are_one_group_of_a_logger(tmp_path: Path) -> None:
    (tmp_path / "tuned" / "3").mkdir(parents=True)
    (tmp_path / "tuned" / SWEEP).write_text("{}")
    for folder, group in (("tuned/3", "tuned"), ("alone/3", None)):
        config = compose_config(["logger=[wandb,mlflow]"], output_dir=str(tmp_path / folder))
        loggers = parse_settings(config).logger
        assert loggers["wandb"]["group"] == group and loggers["mlflow"]["tags"]["sweep"] == (group or "none")


Checked = Callable[..., dict[str, Any]]


def test_figures_that_the_task_logs_are_those_that_are_known() -> None:
    measured = TokenLoss()
    measured.update(torch.tensor(3.0), torch.tensor(2), torch.tensor(5))
    assert set(figures.FIGURES) == {f"{stage}/{name}" for stage in ("val", "test") for name in measured.compute()}


def test_name_near_a_known_figure_is_refused_and_one_far_from_all_is_not(checked: Checked) -> None:
    with pytest.raises(ConfigError) as caught:
        figures.refuse_misspelt("metric", "val/los")
    assert (caught.value.path, caught.value.value) == ("metric", "val/los") and "'val/loss'" in caught.value.remedy
    for name in ("val/loss", "mine/own"):
        figures.refuse_misspelt("metric", name)
    for given in (["optimized_metric=val/accuracy"], ["optimized_metric=test/loss", "test=true"]):
        assert checked(*given)["optimized_metric"] == given[0].partition("=")[2]


NONE_OF_VALIDATION = ("data.corpus.val_fraction=0", "+trainer.limit_val_batches=0.0")


@pytest.mark.parametrize("override", NONE_OF_VALIDATION)
def test_figure_that_is_not_measured_is_told_in_a_single_run_and_refused_in_a_sweep(
    checked: Checked, small: list[str], override: str
) -> None:
    note = figures.left_out(checked(override))
    assert note is not None and "\n" not in note
    assert "optimized_metric=val/loss" in note and "callbacks.checkpoint.monitor=val/loss" in note
    with pytest.raises(ConfigError) as caught:
        preflight(compose_config([*small, override], output_dir="x"), compared=True)
    assert caught.value.path == "optimized_metric"
    assert override.lstrip("+").partition("=")[0] in caught.value.rule


def test_figure_that_another_task_measures_is_told_and_refused_in_a_sweep(checked: Checked, small: list[str]) -> None:
    note = str(figures.left_out(checked("task=grpo")))
    assert "optimized_metric=val/loss (task=grpo, which measures val/reward, val/greedy, val/judged" in note
    assert "callbacks.checkpoint.monitor=val/loss" in note
    with pytest.raises(ConfigError) as caught:
        preflight(compose_config([*small, "task=grpo"], output_dir="x"), compared=True)
    assert caught.value.path == "optimized_metric" and "val/reward" in caught.value.rule
    with pytest.raises(ConfigError) as caught:
        checked("task=grpo", "optimized_metric=val/rewards")
    assert "'val/reward'" in caught.value.remedy


@pytest.mark.slow
def test_note_is_only_of_what_is_missing(checked: Checked) -> None:
    assert figures.left_out(checked()) is None
    assert figures.left_out(checked("optimized_metric=test/loss", "test=true")) is None
    assert "optimized_metric=test/loss (test=false)" in str(figures.left_out(checked("optimized_metric=test/loss")))
    without = checked("optimized_metric=test/loss", "test=true", "data.corpus.test_fraction=0")
    assert "data.corpus.test_fraction=0" in str(figures.left_out(without))


WRONG = {  # settings of the trainer that Lightning takes and fails on, or that mean nothing
    "max_steps": (0, math.nan, True),
    "max_epochs": (-2, 0),
    "limit_train_batches": (-1, 0, 1.5, math.nan),
    "limit_val_batches": (-1, 2.5),
    "overfit_batches": (-1,),
    "fast_dev_run": (-1,),
    "devices": (0, -5, "x", "0", [], [0, 0], [-1], None, 1.5, True),
    "num_nodes": (0,),
    "val_check_interval": (0, 0.25, -1, "soon", math.inf),
    "check_val_every_n_epoch": (0,),
    "max_time": ("abc", 3),
    "accelerator": ("gpux",),
    "gradient_clip_algorithm": ("foo",),
    "profiler": ("foo",),
    "num_sanity_val_steps": (-2,),
    "strategy": ("ddp_spawn", "ddp_fork", "model_parallel", "dpp", None, {}),
}


def test_setting_of_the_trainer_that_cannot_be_right_is_refused() -> None:
    for key, value in ((key, value) for key, values in WRONG.items() for value in values):
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


def test_setting_of_the_trainer_that_may_be_right_is_let_through() -> None:
    for key, value in ((key, value) for key, values in RIGHT.items() for value in values):
        trainer_settings.check({"check_val_every_n_epoch": None, key: value}, train=True)


def test_share_of_an_epoch_between_validations_is_right_where_epochs_are_counted() -> None:
    trainer_settings.check({"check_val_every_n_epoch": 1, "val_check_interval": 0.25}, train=True)
    with pytest.raises(ConfigError) as caught:
        trainer_settings.check({"check_val_every_n_epoch": 1, "val_check_interval": 1.5}, train=True)
    assert caught.value.path == "trainer.val_check_interval"
