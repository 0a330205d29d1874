"""Progress bar in a terminal, parseable lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from blockwright.training.cadence import logs_now
from blockwright.training.configuration.conf import is_lightning_cli
from blockwright.training.tasks.base import Task

QUIET_S = 10  # seconds without a line


class Progress(RichProgressBar):
    """A rich progress bar in a terminal; elsewhere a line of ``key=value`` per logged step.

    Figures are read from the device where training logs or has validated. Those that are logged with ``prog_bar``
    Lightning reads again at every step, for which a GPU's host waits twice a step: nothing here is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._figures: dict[str, float] = {}
        self._terminal, self._said = sys.stdout.isatty(), 0.0
        if not self._terminal:
            self.disable()

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # Lightning would show max_epochs, which is -1 if steps are counted

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._says(trainer):
            step = f"{trainer.global_step}{_end(trainer)}"
            self._say(f"training from step {step}; output in {trainer.default_root_dir}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._says(trainer) and trainer.state.fn == "validate":
            less = _less(trainer.num_val_batches, "trainer.limit_val_batches=8")
            self._say(f"measuring the model on the validation set, {_counted(trainer.num_val_batches)}{less}")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        if self._says(trainer):
            less = _less(trainer.num_test_batches, "trainer.limit_test_batches=8", ", or test=false")
            self._say(f"measuring the model on the test set, {_counted(trainer.num_test_batches)}{less}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logs = logs_now(trainer) and trainer.is_global_zero
        if logs:
            values = {**trainer.callback_metrics, **trainer.logged_metrics}
            shown = (*(f"train/{name}" for name in _shown(pl_module)), "train/lr", "speed/tokens_per_second")
            now = {k: float(values[k]) for k in shown if k in values}
            self._figures |= {k: v for k, v in now.items() if k != "train/lr"}  # a bar is narrow
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._says(trainer):
            return
        if logs:
            self._line(trainer, now)
        elif self._is_quiet():
            self._say(f"training at step {trainer.global_step}{_end(trainer)}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self._figures |= {k: v for k, v in values.items() if k.removeprefix("val/") in _shown(pl_module)}
        super().on_validation_end(trainer, pl_module)
        if self._says(trainer) and not trainer.sanity_checking:
            self._line(trainer, values)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What the bar shows."""
        return dict(self._figures)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._says(trainer) and trainer.state.fn == "validate":
            self._measured(batch_idx + 1, trainer.num_val_batches)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._says(trainer):
            self._measured(batch_idx + 1, trainer.num_test_batches)

    def _measured(self, batches: int, of: Sequence[int | float]) -> None:
        """A line now and then while a measurement lasts."""
        if self._is_quiet():
            self._say(f"measured {batches:,} of {_counted(of)}")

    def _is_quiet(self) -> bool:
        """True if nothing has been printed for a while."""
        return time.monotonic() - self._said > QUIET_S

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        print(line, flush=True)

    def _says(self, trainer: L.Trainer) -> bool:
        return not self._terminal and trainer.is_global_zero

    def _line(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        text = " ".join(f"{key}={value:.6g}" for key, value in values.items())
        self._say(f"step={trainer.global_step} {text}")


def _shown(module: L.LightningModule) -> tuple[str, ...]:
    return module.shown if isinstance(module, Task) else ("loss",)


def _end(trainer: L.Trainer) -> str:
    return f" of {trainer.max_steps}" if trainer.max_steps and trainer.max_steps > 0 else ""


def _counted(batches: Sequence[int | float]) -> str:
    """The batches of all data loaders; infinitely many have no number."""
    count = sum(batches)
    return f"{count:,.0f} batch{'es' * (count != 1)}" if math.isfinite(count) else "batches without end"


def _less(batches: Sequence[int | float], setting: str, or_else: str = "") -> str:
    """How to measure less, where there is more than that, as this command line writes it."""
    if sum(batches) <= 8:
        return ""
    return f"; less: --{setting}" if is_lightning_cli(sys.argv[1:]) else f"; less: ++{setting}{or_else}"
