"""A finale hears of the final figures once, on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from blockwright.training.callbacks.finale import Finale
from blockwright.training.entry.execute import conclude, execute


class Hears(Finale):
    """Keeps what it receives; also a target that a configuration can name."""

    heard: list[tuple[int, dict[str, float]]] = []  # noqa: RUF012

    def on_conclusion(self, trainer: L.Trainer, task: L.LightningModule, metrics: dict[str, float]) -> None:
        self.heard.append((trainer.global_step, metrics))


@pytest.fixture
def heard() -> Any:
    Hears.heard.clear()
    return Hears.heard


@pytest.mark.slow
def test_final_figures_are_of_all_held_out_text(checked: Callable[..., dict[str, Any]], heard: Any) -> None:
    node = f"+callbacks.hears._target_={__name__}.Hears"
    small = ("logger=none", "callbacks=none", node, "data.eval_windows=1", "test=true", "data.corpus.val_fraction=0.2")
    # Overrides of the report's values make no sense without the report.
    run = checked(*small[:1], *small[2:])
    run = replace(run, callbacks={"hears": run.callbacks["hears"]})
    metrics = execute(run)
    assert heard == [(6, metrics)]
    assert {"val/loss", "test/loss", "train/loss"} <= set(metrics)
    whole = replace(run, data={**run.data, "eval_windows": None})
    assert execute(whole)["val/loss"] == metrics["val/loss"]


def test_contract_must_be_kept() -> None:
    with pytest.raises(NotImplementedError):
        Finale().on_conclusion(None, None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_concludes(rank: int, heard: Any) -> None:
    trainer = SimpleNamespace(
        callback_metrics={"val/loss": 1.0},
        fast_dev_run=True,
        is_global_zero=rank == 0,
        callbacks=[Hears(), L.Callback()],
        global_step=3,
    )
    conclude(trainer, None, None, test=False)  # type: ignore[arg-type]
    assert heard == ([(3, {"val/loss": 1.0})] if rank == 0 else [])
