"""The contract of a callback that acts when everything has been measured."""

from __future__ import annotations

import lightning as L


class Finale(L.Callback):
    """A callback that hears of the final figures: after training, full validation and testing, on rank 0."""

    def on_conclusion(self, trainer: L.Trainer, task: L.LightningModule, metrics: dict[str, float]) -> None:
        """``metrics`` holds the last value of everything logged, final validation and test included."""
        raise NotImplementedError
