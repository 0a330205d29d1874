"""The base class of callbacks that run after all measurements."""

from __future__ import annotations

import lightning as L


class Finale(L.Callback):
    """Called with the final figures: after training, full validation and testing, on rank 0."""

    def on_conclusion(self, trainer: L.Trainer, task: L.LightningModule, metrics: dict[str, float]) -> None:
        """``metrics`` holds the last value of everything logged, final validation and test included."""
        raise NotImplementedError
