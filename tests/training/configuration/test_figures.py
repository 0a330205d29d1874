"""Which figures a run will have: told or refused before it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockwright.registry import ConfigError
from blockwright.training.configuration import figures
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.preflight import preflight

Checked = Callable[..., dict[str, Any]]


def test_figures_that_the_task_logs_are_those_that_are_known() -> None:
    from blockwright.training.metrics import TokenLoss

    measured = TokenLoss()
    measured.update(torch.tensor(3.0), torch.tensor(2), torch.tensor(5))
    assert set(figures.FIGURES) == {f"{stage}/{name}" for stage in ("val", "test") for name in measured.compute()}


def test_figure_that_a_callback_may_log_is_let_through(checked: Checked) -> None:
    assert checked("optimized_metric=val/accuracy")["optimized_metric"] == "val/accuracy"
    assert checked("optimized_metric=test/loss", "test=true")["optimized_metric"] == "test/loss"
    with pytest.raises(ConfigError, match="Did you mean 'val/loss'"):
        checked("optimized_metric=val/los")


def test_name_near_a_known_figure_is_refused_and_one_far_from_all_is_not() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'val/loss'") as caught:
        figures.refuse_misspelt("metric", "val/los")
    assert (caught.value.path, caught.value.value) == ("metric", "val/los")
    for name in ("val/loss", "mine/own"):
        figures.refuse_misspelt("metric", name)


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
    grpo = ["task=grpo"]
    note = str(figures.left_out(checked(*grpo)))
    assert "optimized_metric=val/loss (task=grpo, which measures val/reward, val/greedy, val/judged" in note
    assert "callbacks.checkpoint.monitor=val/loss" in note
    with pytest.raises(ConfigError, match=r"because of task=grpo, which measures val/reward") as caught:
        preflight(compose_config([*small, *grpo], output_dir="x"), compared=True)
    assert caught.value.path == "optimized_metric"
    assert checked(*grpo, "optimized_metric=val/reward")
    with pytest.raises(ConfigError, match="Did you mean 'val/reward'"):
        checked(*grpo, "optimized_metric=val/rewards")


@pytest.mark.slow
def test_note_is_only_of_what_is_missing(checked: Checked) -> None:
    assert figures.left_out(checked()) is None
    assert figures.left_out(checked("optimized_metric=test/loss", "test=true")) is None
    assert "optimized_metric=test/loss (test=false)" in str(figures.left_out(checked("optimized_metric=test/loss")))
    without = checked("optimized_metric=test/loss", "test=true", "data.corpus.test_fraction=0")
    assert "data.corpus.test_fraction=0" in str(figures.left_out(without))
