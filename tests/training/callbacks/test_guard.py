"""A bad batch costs one step, alike on all ranks and in everything; a run that stays bad is given up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from blockwright.registry import ConfigError
from blockwright.training.callbacks.guard import Guard
from blockwright.training.callbacks.interruption import Interruption
from blockwright.training.parallel.clipping import total_norm
from blockwright.training.stops import Diverged

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

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        state = trainer.optimizers[0].state
        momenta = [v for held in state.values() for v in held.values() if isinstance(v, torch.Tensor)]
        kept = [*pl_module.decoder.state_dict().values(), *momenta]  # type: ignore[operator, union-attr]
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

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            norm = pl_module.decoder.norm  # type: ignore[union-attr]
            norm.register_forward_hook(lambda module, given, out: out * self.scale)  # type: ignore[operator, union-attr]

        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
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


def test_loss_that_stands_still_has_no_outliers() -> None:
    assert not any(feed(Guard(), [2.0] * 128 + [2.005] * 3))


def test_window_survives_a_checkpoint() -> None:
    first, second = Guard(window=4), Guard(window=4)
    feed(first, [1.0, 2.0, 3.0, 4.0, 5.0])
    first.skipped, first.in_a_row = 3, 2
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() and list(second._seen["loss"]) == [2.0, 3.0, 4.0, 5.0]


def test_gradient_norm_is_that_of_all_gradients() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    module[:2](torch.randn(5, 3)).square().sum().backward()
    all_of_them = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(total_norm(module.parameters()), all_of_them.norm())
    module.zero_grad()
    assert total_norm(module.parameters()) == 0


@pytest.mark.parametrize("wrong", [{"window": 1}, {"patience": 0}, {"sigmas": 0.0}, {"sigmas": math.nan}])
def test_settings_that_judge_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"callbacks\.guard\.{next(iter(wrong))}"):
        Guard(**wrong)
