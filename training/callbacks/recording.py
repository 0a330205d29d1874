"""The configuration in every checkpoint, so that a run that resumes from it can be compared with the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from training.checkpoints.record import KEY


class Recording(L.Callback):
    """Writes the settings that decide the numbers of a run into each of its checkpoints.

    Args:
        settings: of ``training.checkpoints.record.record``
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.settings
