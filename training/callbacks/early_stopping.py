"""Stop training when a metric no longer improves."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping


class EarlyStopping(LightningEarlyStopping):
    """Lightning's EarlyStopping, with the same arguments.

    How this differs from Lightning's: a resumed run uses the configured patience, not that of the checkpoint; and a run
    already stopped by it stops again at once when resumed, not at the next validation.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.wait_count >= max(1, self.patience):  # a patience of 0 ends with the first that is no better
            trainer.should_stop = True
