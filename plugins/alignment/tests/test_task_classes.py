"""What the classes of tasks declare: figures, directions, units, the data and the trained model that they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from blockwright.lab.run_report import table_of
from blockwright.plugins.alignment.tasks.distill import Distill
from blockwright.plugins.alignment.tasks.grpo import Grpo
from blockwright.plugins.alignment.tasks.pairs import Pairwise, Preference
from blockwright.registry import ConfigError
from blockwright.training.entry.start import refuse_untrained
from blockwright.training.figure import by_name, declared, find
from blockwright.training.result import Result
from blockwright.training.tasks.causal_lm import CausalLM


def test_directions_and_units_of_figures() -> None:
    expected = {"reward_std": None, "reward_failures": "less", "reward_length": "more", "loss": None}
    figures = {name: find(f"train/{name}", declared(Grpo)) for name in expected}  # the first that fits counts
    assert {name: figure and figure.better for name, figure in figures.items()} == expected
    assert find("val/loss", declared(Grpo)) is None
    run = Result("completed", parameters=1000, active_parameters=600, steps=3, fit_seconds=1.5)
    metrics = {"val/loss": 0.69, "val/accuracy": 0.5, "train/loss": 0.7}
    table = table_of(replace(run, metrics=metrics, figures=by_name(metrics, declared(Pairwise))))
    _, value, unit, better = (list(column.cells)[2:] for column in table.columns)
    assert value == ["0.69", "0.5", "0.7"] and unit == ["nats per pair", "of pairs", "nats per pair"]
    assert better == ["less", "more", "less"]


def test_task_that_improves_answers_is_not_given_random_weights(checked: Callable[..., Any]) -> None:
    assert Grpo.improves and Preference.improves and not CausalLM.improves and not Distill.improves
    run = checked()
    refuse_untrained(run)
    run = replace(run, task={"name": "grpo", "reward": "exact_match"})
    with pytest.raises(ConfigError) as caught:
        refuse_untrained(run)
    assert caught.value.path == "init_from"
    for start in ({"ckpt_path": "x.ckpt"}, {"init_from": "RUN"}, {"train": False}, {"trainer": {"dry_run": True}}):
        refuse_untrained(replace(run, **start))


def test_task_on_pairs_refuses_data_of_another_kind_before_the_first_batch() -> None:
    other = SimpleNamespace(datamodule=L.LightningDataModule())
    task = type("Task", (Pairwise,), {"trainer": other, "compare": None})
    with pytest.raises(ConfigError) as refusal:
        Pairwise.on_fit_start(task.__new__(task))
    assert refusal.value.path == "data"
