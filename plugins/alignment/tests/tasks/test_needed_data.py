"""A task that is given data of another kind says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from blockwright.plugins.alignment.tasks.needed_data import data_of
from blockwright.plugins.alignment.tasks.pairs import Pairwise
from blockwright.registry import ConfigError


class Pairs(L.LightningDataModule):
    """A kind of its own."""


def test_data_of_another_kind_is_refused() -> None:
    def task(data: L.LightningDataModule) -> Any:
        return SimpleNamespace(trainer=SimpleNamespace(datamodule=data))

    pairs = Pairs()
    assert data_of(task(pairs), Pairs, "needs pairs", "Use pairs") is pairs
    with pytest.raises(ConfigError) as refusal:
        data_of(task(L.LightningDataModule()), Pairs, "needs pairs", "Use pairs")
    error = refusal.value
    assert (error.path, error.value, error.rule) == ("data", "LightningDataModule", "needs pairs")


def test_task_on_pairs_refuses_a_text_before_the_first_batch() -> None:
    task: Any = SimpleNamespace(trainer=SimpleNamespace(datamodule=L.LightningDataModule()))
    task = type("Task", (Pairwise,), {"trainer": task.trainer, "compare": None})
    with pytest.raises(ConfigError, match="compares answers"):
        Pairwise.on_fit_start(task.__new__(task))
