"""Checkpoints of chosen steps, which later runs branch off from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count
from blockwright.training.callbacks.interruption import last_checkpoint
from blockwright.training.checkpoints.find import milestone
from blockwright.training.checkpoints.saving import save


@enforced("callbacks.milestones")
class Milestones(Checkpoint):
    """Keeps ``step_N.ckpt`` beside ``last.ckpt`` for each chosen step.

    With the schedule `WarmupStableDecay` and a warm-up in steps, a run that resumes from such a checkpoint with its own
    ``trainer.max_steps`` is the same, bit for bit, as one that had that length from its start: until its decay the
    schedule does not depend on the length.

    As a ``Checkpoint`` it runs after the other callbacks, whose states it saves.

    Args:
        steps: optimizer steps done at each
    """

    def __init__(self, steps: Sequence[Count]) -> None:
        self.steps = frozenset(steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer)  # of a run that was killed after it saved last.ckpt at this step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._keep(trainer)

    def _keep(self, trainer: L.Trainer) -> None:
        if trainer.global_step not in self.steps or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = milestone(last_checkpoint(trainer).parent, trainer.global_step)
        if not trainer.strategy.broadcast(path.exists()):
            save(trainer, path)
