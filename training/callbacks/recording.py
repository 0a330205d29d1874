"""Store the configuration in every checkpoint, to compare it with that of a resuming run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from blockwright.training.checkpoints.record import KEY


class Recording(L.Callback):
    """Writes the settings that determine the numbers of a run into its checkpoints.

    Args:
        settings: from ``blockwright.training.checkpoints.record.record``
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.settings
