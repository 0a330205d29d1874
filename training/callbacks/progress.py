"""Progress bar in a terminal, parseable lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from blockwright.training.cadence import logs_now
from blockwright.training.tasks.base import Task


class Progress(RichProgressBar):
    """A rich progress bar in a terminal; elsewhere a line of ``key=value`` per logged step."""

    def __init__(self) -> None:
        super().__init__()
        self._terminal = sys.stdout.isatty()
        if not self._terminal:
            self.disable()

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # Lightning would show max_epochs, which is -1 if steps are counted

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._says(trainer):
            end = f" of {trainer.max_steps}" if trainer.max_steps and trainer.max_steps > 0 else ""
            print(f"training from step {trainer.global_step}{end}; output in {trainer.default_root_dir}", flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._says(trainer) and trainer.state.fn == "validate":
            print("measuring the model on all of the validation text", flush=True)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        if self._says(trainer):
            print("measuring the model on all of the test text", flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._says(trainer) and logs_now(trainer):
            values = {**trainer.callback_metrics, **trainer.logged_metrics}
            figures = pl_module.shown if isinstance(pl_module, Task) else ("loss",)
            shown = (*(f"train/{name}" for name in figures), "train/lr", "speed/tokens_per_second")
            self._line(trainer, {k: float(values[k]) for k in shown if k in values})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._says(trainer) and not trainer.sanity_checking:
            values = trainer.callback_metrics
            self._line(trainer, {k: float(v) for k, v in values.items() if k.startswith("val/")})

    def _says(self, trainer: L.Trainer) -> bool:
        return not self._terminal and trainer.is_global_zero

    @staticmethod
    def _line(trainer: L.Trainer, values: dict[str, float]) -> None:
        text = " ".join(f"{key}={value:.6g}" for key, value in values.items())
        print(f"step={trainer.global_step} {text}", flush=True)
