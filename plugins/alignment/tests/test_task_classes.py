"""What the classes of tasks declare: figures, directions, units, and whether they need a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from blockwright.lab.report.single import losses
from blockwright.lab.report.svg import standalone
from blockwright.lab.run_report import table_of
from blockwright.plugins.alignment.tasks.distill import Distill
from blockwright.plugins.alignment.tasks.grpo import Grpo
from blockwright.plugins.alignment.tasks.pairs import Pairwise
from blockwright.plugins.alignment.tasks.preference import Preference
from blockwright.registry import ConfigError
from blockwright.training.entry.start import refuse_untrained
from blockwright.training.figure import by_name, declared, find, names_in
from blockwright.training.result import Result
from blockwright.training.tasks.causal_lm import CausalLM

Checked = Callable[..., dict[str, Any]]


def test_first_that_fits_counts() -> None:
    of_grpo = declared(Grpo)
    found = {
        name: find(f"train/{name}", of_grpo) for name in ("reward_std", "reward_failures", "reward_length", "loss")
    }
    assert {name: figure and figure.better for name, figure in found.items()} == {
        "reward_std": None, "reward_failures": "less", "reward_length": "more", "loss": None,
    }  # fmt: skip
    assert find("val/loss", of_grpo) is None and names_in("val", Grpo.figures)[:2] == ("reward", "greedy")


def test_loss_of_a_task_on_pairs_is_no_nats_a_token() -> None:
    run = Result("completed", parameters=1000, active_parameters=600, steps=3, fit_seconds=1.5)
    metrics = {"val/loss": 0.69, "val/accuracy": 0.5, "train/loss": 0.7}
    table = table_of(replace(run, metrics=metrics, figures=by_name(metrics, declared(Pairwise))))
    name, value, unit, better = (list(column.cells)[2:] for column in table.columns)
    assert name == ["validation loss", "validation accuracy", "last training loss"]
    assert value == ["0.69", "0.5", "0.7"] and unit == ["nats per pair", "of pairs", "nats per pair"]
    assert better == ["less", "more", "less"]
    assert "loss, nats per pair" in standalone(losses([(1, 0.7)], [], unit=unit[0]))


def test_task_that_improves_answers_is_not_given_random_weights(checked: Checked) -> None:
    run = checked()
    refuse_untrained(run)
    run = replace(run, task={"name": "grpo", "reward": "exact_match"})
    with pytest.raises(ConfigError, match="random weights give none") as caught:
        refuse_untrained(run)
    assert caught.value.path == "init_from"
    for start in ({"ckpt_path": "x.ckpt"}, {"init_from": "RUN"}, {"train": False}, {"trainer": {"dry_run": True}}):
        refuse_untrained(replace(run, **start))


def test_tasks_that_improve_answers_say_so() -> None:
    assert Grpo.improves and Preference.improves
    assert not CausalLM.improves and not Distill.improves
