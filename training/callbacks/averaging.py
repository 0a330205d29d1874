"""Averaged weights: an exponential moving average that is validated, tested and kept instead of the last weights."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import Strategy

from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import ProperFraction, Whole
from blockwright.training.parallel.refusals import no_shards


@enforced("callbacks.averaging")
class Averaging(EMAWeightAveraging):
    """Validates, tests and ends with a moving average of the weights: w̄ ← β w̄ + (1 − β) w after each step.

    The average has less noise than the last weights: a difference of arms is seen with fewer seeds. Training itself is
    unchanged. A checkpoint's weights are the averaged ones, and the current ones are stored next to them, so that a
    resumed run is bit-identical to one that was not stopped.

    How this differs from Lightning's: the current weights are replaced only when training has been saved, a checkpoint
    written amid a validation tells the two apart, and sums over ranks survive. Not for strategies that shard the model.

    Args:
        decay: β; the average reaches about 1 / (1 − β) steps back
        from_step: optimizer steps that are left out of the average
    """

    whole = True  # of the weights of the model, on each process

    def __init__(self, decay: ProperFraction = 0.9, from_step: Whole = 0) -> None:
        super().__init__(decay=decay, update_starting_at_step=from_step)
        self._swapped = False  # whether the module holds the average, as in a validation

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and type(trainer.strategy).save_checkpoint is not Strategy.save_checkpoint:
            raise no_shards("callbacks.averaging", type(trainer.strategy).__name__)
        with warnings.catch_warnings():  # of models that are built by a hook, which may not be sharded
            warnings.filterwarnings("ignore", ".*WeightAveraging callback with a model that overrides.*")
            super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass  # a checkpoint that is written here stores the current weights, too

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._copy_average_to_current(pl_module)

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            current, averaged = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint |= {"state_dict": averaged, "current_model_state": current}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if (current := checkpoint.get("current_model_state")) is not None:
            weights = {name for name, _ in chain(pl_module.named_parameters(), pl_module.named_buffers())}
            sums = {name: value for name, value in checkpoint["state_dict"].items() if name not in weights}
            checkpoint["current_model_state"] = {**current, **sums}  # over all ranks: the task adds them last
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
