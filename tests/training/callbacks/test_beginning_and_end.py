"""Early stopping of a resumed run, and the final figures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from blockwright.training.callbacks.interruption import EarlyStopping, Interruption
from blockwright.training.callbacks.step_end import Finale
from blockwright.training.entry.execute import conclude, execute

WORSE = ("optimizer.lr=3.0", "scheduler=constant", "trainer.max_steps=6")
EACH = {"enable_checkpointing": True, "limit_val_batches": 1, "val_check_interval": 1}


@pytest.mark.slow
def test_resumed_run_keeps_its_count_and_takes_the_patience_of_now(fit: Any, tmp_path: Path) -> None:
    first = EarlyStopping("val/loss", min_delta=100.0, patience=2)  # nothing is ever an improvement
    ended = fit(*WORSE, callbacks=[first, Interruption()], **EACH)
    assert ended.global_step == 3 and first.wait_count == 2
    last = tmp_path / "checkpoints" / "last.ckpt"
    same = fit(*WORSE, callbacks=[EarlyStopping("val/loss", min_delta=100.0, patience=2)], ckpt_path=last, **EACH)
    assert same.global_step == 3  # ended it was, ended it is
    longer = fit(*WORSE, callbacks=[EarlyStopping("val/loss", min_delta=100.0, patience=3)], ckpt_path=last, **EACH)
    assert longer.global_step == 4


@pytest.mark.slow
def test_patience_of_zero_ends_with_the_first_validation_that_is_no_better(fit: Callable[..., L.Trainer]) -> None:
    stopped = fit(*WORSE, callbacks=[EarlyStopping("val/loss", min_delta=100.0, patience=0)], **EACH)
    assert stopped.global_step == 2  # the first is better than nothing


class Hears(Finale):
    """Keeps what it receives; also a target that a configuration can name."""

    heard: list[tuple[int, dict[str, float]]] = []  # noqa: RUF012

    def on_conclusion(self, trainer: L.Trainer, task: L.LightningModule, metrics: dict[str, float]) -> None:
        self.heard.append((trainer.global_step, metrics))


@pytest.fixture
def heard() -> Any:
    Hears.heard.clear()
    return Hears.heard


class Session(CSVLogger):
    """A logger with a session that is the process's until it is finished, as that of Weights and Biases."""

    finished: list[str] = []  # noqa: RUF012

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(finish=lambda: self.finished.append(str(self.save_dir)))

    def log_metrics(self, *given: Any, **named: Any) -> None: ...

    def log_hyperparams(self, *given: Any, **named: Any) -> None: ...

    def save(self) -> None: ...


def test_session_of_a_logger_ends_with_its_run_and_with_a_failure(
    checked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = [f"+logger.own._target_={__name__}.Session", f"+logger.own.save_dir={tmp_path}"]
    run = replace(checked("logger=none", *node), train=False)
    for end in (dict, RuntimeError("a failure")):
        monkeypatch.setattr("blockwright.training.entry.execute.conclude", Mock(side_effect=[end]))
        with suppress(RuntimeError):
            execute(run)
    assert Session.finished == [str(tmp_path)] * 2


@pytest.mark.slow
def test_final_figures_are_of_all_held_out_text(checked: Callable[..., dict[str, Any]], heard: Any) -> None:
    node = f"+callbacks.hears._target_={__name__}.Hears"
    run = checked("logger=none", node, "data.eval_windows=1", "test=true", "data.corpus.val_fraction=0.2")
    run = replace(run, callbacks={"hears": run.callbacks["hears"]})
    metrics = execute(run)
    assert heard == [(6, metrics)]
    assert {"val/loss", "test/loss", "train/loss"} <= set(metrics)
    whole = replace(run, data={**run.data, "eval_windows": None})
    assert execute(whole)["val/loss"] == metrics["val/loss"]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_concludes(rank: int, heard: Any) -> None:
    own = {"callback_metrics": {"val/loss": 1.0}, "fast_dev_run": True, "callbacks": [Hears(), L.Callback()]}
    trainer: Any = SimpleNamespace(**own, is_global_zero=rank == 0, global_step=3)
    conclude(trainer, None, None, test=False)  # type: ignore[arg-type]
    assert heard == ([(3, {"val/loss": 1.0})] if rank == 0 else [])
