"""A bad batch costs one step, alike in everything; a run that stays bad is given up; dead experts are reported once."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from blockwright.registry import ConfigError
from blockwright.training.callbacks.experts import DeadExperts
from blockwright.training.callbacks.guard import Guard
from blockwright.training.callbacks.interruption import Interruption
from blockwright.training.result import Diverged

Fit = Callable[..., L.Trainer]

BIAS = ("model/gating=sigmoid_bias", "model.gating.bias_step=0.05")


class Poison(L.Callback):
    """Multiplies the gradients of some batches by a number, as a bad batch or a broken device would."""

    def __init__(self, factor: float, *at: int) -> None:
        self.factor, self.at, self.seen = factor, at, list[list[torch.Tensor]]()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx in self.at:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.factor)

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state
        momenta = [v for held in state.values() for v in held.values() if isinstance(v, torch.Tensor)]
        kept = [*task.decoder.state_dict().values(), *momenta]
        self.seen.append([t.clone() for t in kept])


@pytest.mark.parametrize(
    ("optimizer", "factor"), [("muon_tiny", math.nan), pytest.param("adamw", math.inf, marks=pytest.mark.slow)]
)
def test_skipped_step_moves_nothing_and_training_ends_finite(
    fit: Fit, factor: float, optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    guard, poison = Guard(), Poison(factor, 2)
    with pytest.warns(UserWarning, match="step 2 is skipped: its gradient norm is"):
        trainer = fit(f"optimizer={optimizer}", "trainer.max_steps=5", *BIAS, callbacks=[poison, guard])
    before, after, later = poison.seen[2], poison.seen[3], poison.seen[4]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, later, strict=True))
    assert all(t.isfinite().all() for t in trainer.lightning_module.state_dict().values())
    assert trainer.global_step == 5 and guard.skipped == 1 and guard.in_a_row == 0
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.slow
def test_loss_that_is_no_number_skips_and_is_not_in_the_mean(fit: Fit) -> None:
    class Loss(L.Callback):
        scale = 1.0

        def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
            task.decoder.norm.register_forward_hook(lambda module, given, out: out * self.scale)

        def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
            self.scale = math.nan if batch_idx == 2 else 1.0

    with pytest.warns(UserWarning, match="step 2 is skipped: its loss is nan"):
        trainer = fit("trainer.log_every_n_steps=6", callbacks=[Loss(), Guard()])
    assert trainer.callback_metrics["train/loss"].isfinite()


@pytest.mark.slow
def test_nan_for_ever_is_given_up_with_the_checkpoint_intact(fit: Fit, tmp_path: Path) -> None:
    callbacks = [Poison(math.nan, *range(3, 99)), Guard(patience=2), Interruption(every_n_steps=1)]
    with pytest.warns(UserWarning), pytest.raises(Diverged, match="in each of the last 2 steps") as caught:
        fit(callbacks=callbacks, enable_checkpointing=True)
    assert caught.value.step == 4
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4 and all(t.isfinite().all() for t in saved["state_dict"].values())
    assert saved["callbacks"]["Guard"]["skipped"] == 1


def test_micro_batches_are_judged_together(fit: Fit) -> None:
    guard = Guard()
    with pytest.warns(UserWarning, match="step 1 is skipped"):
        fit("trainer.accumulate_grad_batches=2", "trainer.max_steps=3", callbacks=[Poison(math.nan, 2), guard])
    loss = [7.0, 4.0]  # of 257 symbols, ln 257 = 5.5
    assert guard.skipped == 1 and len(guard._seen["loss"]) == 2
    assert all(min(loss) < value < max(loss) for value in guard._seen["loss"])


def feed(guard: Guard, values: list[float]) -> list[str | None]:
    said = []
    for i, value in enumerate(values):
        step = {"loss": value, "gradient norm": 1.0 + 0.01 * (i % 7)}
        said.append(guard.judge(step))
        guard.record(step, said[-1] is not None)
    return said


def test_outlier_is_judged_once_the_window_is_full_and_upwards_only() -> None:
    draw = random.Random(0)
    noise = [3 + 0.1 * draw.gauss(0, 1) for _ in range(128)]
    assert feed(Guard(), [*noise[:127], 30.0])[-1] is None
    spread = (sum((v - sum(noise) / 128) ** 2 for v in noise) / 128) ** 0.5
    above = sum(noise) / 128 + 6 * spread
    assert feed(Guard(), [*noise, above - 1e-6])[-1] is None
    said = feed(Guard(), [*noise, above + 1e-3])[-1]
    assert said and "sigma above the last 128" in said and said.startswith("its loss")
    assert feed(Guard(), [*noise, -30.0])[-1] is None
    assert feed(Guard(sigmas=None), [*noise, 30.0])[-1] is None


def test_level_that_has_changed_is_believed_before_patience_ends() -> None:
    draw = random.Random(0)
    said = feed(Guard(), [2 + 0.02 * draw.gauss(0, 1) for _ in range(128)] + [3.0] * 20)
    assert 1 <= sum(bool(s) for s in said[128:]) < 10 and said[-1] is None
    # One that stands still has no outliers.
    assert not any(feed(Guard(), [2.0] * 128 + [2.005] * 3))


def test_window_survives_a_checkpoint() -> None:
    first, second = Guard(window=4), Guard(window=4)
    feed(first, [1.0, 2.0, 3.0, 4.0, 5.0])
    first.skipped, first.in_a_row = 3, 2
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() and list(second._seen["loss"]) == [2.0, 3.0, 4.0, 5.0]


def test_settings_that_judge_nothing_are_refused() -> None:
    wrong: list[tuple[str, Any]] = [("window", 1), ("patience", 0), ("sigmas", 0.0), ("sigmas", math.nan)]
    for key, value in wrong:
        with pytest.raises(ConfigError) as caught:
            Guard(**{key: value})
        assert caught.value.path == f"callbacks.guard.{key}"


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


def test_expert_just_above_the_limit_and_a_layer_without_tokens_are_alive_and_a_collapse_is_called_so() -> None:
    shares = FAIR.clone()
    shares[0] = 0.0102 / 8
    assert DeadExperts(steps=1).look("0", shares, 5, 5) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert DeadExperts(steps=1).look("0", torch.zeros(8), 10, 10) == 0
    with pytest.warns(UserWarning, match="its router has collapsed: 4 of 8"):
        DeadExperts(steps=10).look("2", without(0, 1, 2, 3), 10, 10)
    with pytest.warns(UserWarning, match="dead experts: 3 of 8"):
        DeadExperts(steps=10).look("2", without(0, 1, 2), 10, 10)


@pytest.mark.slow
def test_collapsed_router_of_a_run_is_found_while_it_trains(fit: Callable[..., L.Trainer]) -> None:
    class Collapse(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
            gate = task.decoder.layers[1].ffn.gating
            gate.bias.fill_(0)
            gate.bias[: gate.top_k] = 1e3

    with pytest.warns(UserWarning, match="layer 1: its router has collapsed"):
        trainer = fit("model/gating=sigmoid_bias", "trainer.max_steps=4", callbacks=[Collapse(), DeadExperts(steps=3)])
    assert trainer.callback_metrics["train_load/dead_experts"] > 0
    # Nothing is logged of dead experts where there are none.
    trainer = fit("trainer.max_steps=2", callbacks=[DeadExperts(steps=1000)])
    assert "train_load/layer1/entropy" in trainer.callback_metrics
    assert "train_load/dead_experts" not in trainer.callback_metrics


def test_what_is_idle_survives_a_checkpoint() -> None:
    first, second = DeadExperts(steps=100), DeadExperts(steps=100)
    first.look("1", without(3), 90, 90)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="dead experts"):
        assert second.look("1", without(3), 10, 100) == 1


def test_settings_that_find_nothing_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"below": 0.0}, {"below": 1.5}, {"steps": 0}]
    for settings in wrong:
        with pytest.raises(ConfigError):
            DeadExperts(**settings)
