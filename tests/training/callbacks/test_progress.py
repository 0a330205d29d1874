"""Where there is no terminal, a line of key=value for each logged step; tokens a second leave validation out."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from blockwright.blocks.cost import forward_flops_per_token
from blockwright.training.callbacks import progress as module
from blockwright.training.callbacks import throughput
from blockwright.training.callbacks.progress import Progress
from blockwright.training.callbacks.throughput import Throughput
from blockwright.training.parallel.ranks import DataRanks

Fit = Callable[..., L.Trainer]


def lines(text: str) -> list[dict[str, float]]:
    found = [line for line in text.splitlines() if line.startswith("step=")]
    assert all(re.fullmatch(r"(\S+=\S+)( \S+=\S+)*", line) for line in found)
    return [{k: float(v) for k, v in (pair.split("=") for pair in line.split())} for line in found]


@pytest.mark.slow
def test_logged_steps_and_validations_are_lines(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"log_every_n_steps": 2, "limit_val_batches": 1, "val_check_interval": 3}
    fit(callbacks=[Throughput(warmup=1), Progress()], enable_progress_bar=True, **settings)
    text = capsys.readouterr().out
    said = lines(text)
    assert text.startswith("training from step 0 of 6; output in ")
    steps = [(line["step"], "val/loss" in line) for line in said]
    assert steps == [(2, False), (3, True), (4, False), (6, False), (6, True)]
    assert all({"train/loss", "train/lr"} <= set(line) for line in said if "val/loss" not in line)
    assert "speed/tokens_per_second" in said[-2]
    assert said[-2]["train/loss"] < said[0]["train/loss"]


def test_terminal_gets_a_bar_and_no_lines(fit: Fit, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress()
    assert progress.is_enabled
    fit("trainer.max_steps=2", callbacks=[progress], enable_progress_bar=True, log_every_n_steps=2)
    assert lines(said := capsys.readouterr().out) == [] and "train/loss" in said


@pytest.mark.slow
def test_quiet_training_and_measuring_get_a_line(fit: Fit, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_S", -1)
    settings = {"enable_progress_bar": True, "log_every_n_steps": 6, "limit_val_batches": 1}
    trainer = fit("trainer.max_steps=2", callbacks=[Progress()], **settings)
    said = capsys.readouterr().out
    assert "training at step 1 of 2\n" in said
    trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    said = capsys.readouterr().out
    assert "on the validation set, 1 batch\n" in said
    assert "measured 1 of 1 batch\n" in said


TOKENS = 2 * 32  # of a batch of the small run


class Clock:
    """A second passes in each training step, a hundred in each validation batch."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Passing(L.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rates: list[float | None] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock.now += 1

    def on_validation_batch_start(self, *args: Any) -> None:
        self.clock.now += 100

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        value = trainer.callback_metrics.get("speed/tokens_per_second")
        self.rates.append(None if value is None else float(value))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: 1e9)
    return clock


def test_tokens_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each has other padding; two of which read the same windows."""
    others = torch.tensor(11 + 40 + 11)

    class Four(DataRanks):
        def sum(self, value: torch.Tensor) -> torch.Tensor:
            return value + others

    monkeypatch.setattr(throughput, "data_ranks", lambda trainer: Four(4, together=2))
    assert throughput._of_all(torch.tensor(40), L.Trainer(logger=False), torch.device("cpu")) == 51


@pytest.mark.slow
def test_rate_leaves_out_warm_up_and_validation(fit: Fit, clock: Clock) -> None:
    passing = Passing(clock)
    settings = {"log_every_n_steps": 1, "limit_val_batches": 1, "val_check_interval": 3}
    trainer = fit(callbacks=[passing, Throughput(warmup=2)], **settings)
    assert passing.rates == [None, None, None, TOKENS, TOKENS, TOKENS]  # as known before each step
    assert float(trainer.callback_metrics["speed/tokens_per_second"]) == TOKENS


@pytest.mark.slow
def test_rate_is_the_mean_since_the_last_log_and_utilisation_three_forward_passes_over_the_peak(
    fit: Fit, clock: Clock
) -> None:
    trainer = fit("trainer.max_steps=4", callbacks=[Passing(clock), Throughput(warmup=1)], log_every_n_steps=2)
    assert float(trainer.callback_metrics["speed/tokens_per_second"]) == TOKENS
    flops = 3 * forward_flops_per_token(trainer.lightning_module.model_config, 32)
    assert float(trainer.callback_metrics["speed/mfu"]) == pytest.approx(TOKENS * flops / 1e9, rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "multiplied"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)],
)
def test_the_peak_is_of_the_precision_in_which_a_step_multiplies(
    monkeypatch: pytest.MonkeyPatch, precision: Any, multiplied: torch.dtype
) -> None:
    measured: list[torch.dtype] = []
    peaks = {multiplied: 1e9, torch.float32: 2e9}
    monkeypatch.setattr(throughput, "_peak_in", lambda device, dtype, size: measured.append(dtype) or peaks[dtype])

    class One(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 2))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            assert (batch @ self.weight).dtype == multiplied
            return (batch @ self.weight).float().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    off: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    off |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_steps": 1}
    trainer = L.Trainer(**off, precision=precision, callbacks=[Throughput()])
    trainer.fit(One(), torch.utils.data.DataLoader(torch.ones(1, 2), batch_size=1))
    assert set(measured) == {multiplied, torch.float32}  # the faster: some CPUs emulate bf16
    assert trainer.callbacks[0]._peak == 2e9
