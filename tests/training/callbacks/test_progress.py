"""Where there is no terminal, a line of key=value for each logged step; a program can read them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import lightning as L
import pytest

from blockwright.training.callbacks import progress as module
from blockwright.training.callbacks.progress import Progress
from blockwright.training.callbacks.throughput import Throughput

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
    assert [(line["step"], "val/loss" in line) for line in said] == [
        (2, False),
        (3, True),
        (4, False),
        (6, False),
        (6, True),
    ]
    assert all({"train/loss", "train/lr"} <= set(line) for line in said if "val/loss" not in line)
    assert "speed/tokens_per_second" in said[-2]
    assert said[-2]["train/loss"] < said[0]["train/loss"]


def test_terminal_gets_a_bar_and_no_lines(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress()
    assert progress.is_enabled
    fit("trainer.max_steps=1", callbacks=[progress], enable_progress_bar=True)
    assert lines(capsys.readouterr().out) == []
    assert progress._get_train_description(0) == "training"


@pytest.mark.slow
def test_quiet_training_and_measuring_get_a_line(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_S", -1)
    trainer = fit(
        "trainer.max_steps=2",
        callbacks=[Progress()],
        enable_progress_bar=True,
        log_every_n_steps=6,
        limit_val_batches=1,
    )
    said = capsys.readouterr().out
    assert "training at step 1 of 2\n" in said
    trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    said = capsys.readouterr().out
    assert "on the validation set, 1 batch\n" in said
    assert "measured 1 of 1 batch\n" in said


def test_measuring_says_how_to_measure_less_where_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = "trainer.limit_val_batches=8"
    for command, hint in (("test=false", f"; less: +{setting}, or x"), ("validate", f"; less: --{setting}")):
        monkeypatch.setattr(module.sys, "argv", ["train.py", command])
        assert module._less([9], setting, ", or x") == hint
    assert module._less([4, 4], setting) == ""
