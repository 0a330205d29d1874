"""An expert that gets nothing is reported once, after it has had nothing for long; a router that collapses likewise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from blockwright.registry import ConfigError
from blockwright.training.callbacks.experts import DeadExperts

FAIR = torch.full((8,), 1 / 8)


def without(*dead: int) -> torch.Tensor:
    shares = FAIR.clone()
    shares[list(dead)] = 0.0006  # less than 1 % of the fair share, also of what four are left with
    return shares / shares.sum()


def test_dead_expert_is_told_of_once_and_after_so_many_steps() -> None:
    watch = DeadExperts(steps=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [watch.look("1", without(3), 25, s) for s in (25, 50, 75)] == [0, 0, 0]
    with pytest.warns(UserWarning, match=r"step 100, layer 1: dead experts: 1 of 8 .* less than 1% .*new: 3\)"):
        assert watch.look("1", without(3), 25, 100) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.look("1", without(3), 25, 125) == 1
        assert watch.look("1", FAIR, 25, 150) == 0  # it lives again
    with pytest.warns(UserWarning, match="dead experts"):
        assert watch.look("1", without(3), 100, 250) == 1


def test_expert_just_above_the_limit_is_alive() -> None:
    watch = DeadExperts(steps=1)
    shares = FAIR.clone()
    shares[0] = 0.0102 / 8
    assert watch.look("0", shares, 5, 5) == 0


def test_collapse_is_called_so() -> None:
    with pytest.warns(UserWarning, match="its router has collapsed: 4 of 8"):
        DeadExperts(steps=10).look("2", without(0, 1, 2, 3), 10, 10)


def test_layer_without_tokens_has_no_dead(recwarn: pytest.WarningsRecorder) -> None:
    assert DeadExperts(steps=1).look("0", torch.zeros(8), 10, 10) == 0
    assert not [w for w in recwarn if w.category is not ResourceWarning]  # of what an earlier test left unclosed


@pytest.mark.slow
def test_collapsed_router_of_a_run_is_found_while_it_trains(fit: Callable[..., L.Trainer]) -> None:
    class Collapse(L.Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            gate = pl_module.decoder.layers[1].ffn.gating  # type: ignore[union-attr, index, operator]
            gate.bias.fill_(0)
            gate.bias[: gate.top_k] = 1e3

    with pytest.warns(UserWarning, match="layer 1: its router has collapsed"):
        trainer = fit("model/gating=sigmoid_bias", "trainer.max_steps=4", callbacks=[Collapse(), DeadExperts(steps=3)])
    assert trainer.callback_metrics["train_load/dead_experts"] > 0


@pytest.mark.slow
def test_nothing_is_logged_of_dead_experts_where_there_are_none(fit: Callable[..., L.Trainer]) -> None:
    trainer = fit("trainer.max_steps=2", callbacks=[DeadExperts(steps=1000)])
    assert "train_load/layer1/entropy" in trainer.callback_metrics
    assert "train_load/dead_experts" not in trainer.callback_metrics


def test_what_is_idle_survives_a_checkpoint() -> None:
    first, second = DeadExperts(steps=100), DeadExperts(steps=100)
    first.look("1", without(3), 90, 90)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="dead experts"):
        assert second.look("1", without(3), 10, 100) == 1


@pytest.mark.parametrize("wrong", [{"below": 0.0}, {"below": 1.5}, {"steps": 0}])
def test_settings_that_find_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DeadExperts(**wrong)
