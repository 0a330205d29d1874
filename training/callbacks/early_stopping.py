"""Stop training when a metric no longer improves."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from blockwright.training.figure import mode_in


class EarlyStopping(LightningEarlyStopping):
    """Lightning's EarlyStopping, with the same arguments.

    How this differs from Lightning's: whether more or less is better follows from the figure; a resumed run uses the
    configured patience, not that of the checkpoint; and a run already stopped by it stops again at once when resumed,
    not at the next validation.

    Args:
        args, settings: those of Lightning's
        mode: ``min`` or ``max``, of a figure that no task and no callback declares; else null
    """

    def __init__(self, *args: Any, mode: Literal["min", "max"] | None = None, **settings: Any) -> None:
        super().__init__(*args, mode=mode or "min", **settings)  # type: ignore[misc] # jsonargparse reads this call
        self.asked_mode = mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        mode = mode_in(trainer, "callbacks.early_stopping", self.monitor, self.asked_mode)
        if mode != self.mode:
            self.mode, self.min_delta, self.best_score = mode, -self.min_delta, -self.best_score
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.wait_count >= max(1, self.patience):  # a patience of 0 ends with the first that is no better
            trainer.should_stop = True
