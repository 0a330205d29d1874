"""Callbacks that act at the end of an optimizer step, before anything can write a checkpoint of it."""

from __future__ import annotations

from typing import Any

import lightning as L

from blockwright.training.tasks.base import Task


class StepEnd(L.Callback):
    """A callback whose state, or what it does to weights, belongs to an optimizer step.

    Lightning's ``on_train_batch_end`` calls one callback after the other, and each may write a checkpoint; what a later
    one does to the step would be missing in it. A ``Task`` calls ``on_step_end`` before all of them. For other modules
    it is called in ``on_train_batch_end``.
    """

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Act on the step just taken, or skipped.

        Args:
            trainer: does not count the step yet
            pl_module: the task
            step: optimizer steps done, with this one
        """
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, Task) and not trainer.fit_loop._should_accumulate():
            self.on_step_end(trainer, pl_module, trainer.global_step)


# --- the base class of callbacks that run after all measurements ---


class Finale(L.Callback):
    """Called with the final figures: after training, full validation and testing, on rank 0."""

    def on_conclusion(self, trainer: L.Trainer, task: L.LightningModule, metrics: dict[str, float]) -> None:
        """``metrics`` holds the last value of everything logged, final validation and test included."""
        raise NotImplementedError
