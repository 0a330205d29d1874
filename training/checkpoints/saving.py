"""One way to save a trainer's state, whatever its strategy: whole or not at all, and never worse than what is there."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blocks import manifest
from training.checkpoints.atomic import partial_of, put_in_place, refused_if_unwritable
from training.checkpoints.plugin import SealedCheckpoints


def save(trainer: L.Trainer, path: Path, weights_only: bool | None = False) -> bool:
    """Save the state of training; to be called on all ranks.

    A strategy that leaves files to the trainer's CheckpointIO has them written whole there. One that writes a format
    of its own (a folder of shards, say) writes beside the place, and rank 0 seals and renames.

    Returns:
        whether it was saved: weights that are no finite numbers are not

    Raises:
        ConfigError: it cannot be written
    """
    if not _is_finite_everywhere(trainer):
        rank_zero_warn(f"not saved: some weights are no finite numbers; {path} stays as it was")
        return False
    strategy = trainer.strategy
    if type(strategy).save_checkpoint is Strategy.save_checkpoint:
        trainer.save_checkpoint(path, weights_only)
        return True
    partial = Path(strategy.broadcast(str(partial_of(path))))
    with refused_if_unwritable(path, partial, owns=trainer.is_global_zero):
        path.parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(partial, weights_only)
        if trainer.is_global_zero:
            if isinstance(strategy.checkpoint_io, SealedCheckpoints):
                strategy.checkpoint_io.wait()
            if partial.is_dir():
                manifest.seal_folder(partial)
            put_in_place(partial, path)
    strategy.barrier("checkpoint in place")
    return True


def _is_finite_everywhere(trainer: L.Trainer) -> bool:
    """Whether all weights of all ranks are finite: each rank looks at the shards that it holds."""
    state = [*trainer.lightning_module.parameters(), *trainer.lightning_module.buffers()]
    held = [t.to_local() if hasattr(t, "to_local") else t for t in state]
    return trainer.strategy.reduce_boolean_decision(all_finite(held), all=True)


@torch.no_grad()
def all_finite(tensors: list[Tensor]) -> bool:
    """Whether there is no NaN and no infinity in floating-point tensors; asks the device once."""
    largest = [t.detach().abs().max().float() for t in tensors if t.is_floating_point() and t.numel()]
    return all(t.isfinite() for t in _by_device(largest))


def _by_device(scalars: list[Tensor]) -> list[Tensor]:
    """The largest of each device's scalars; a NaN among them is the largest."""
    devices = {t.device for t in scalars}
    return [torch.stack([t for t in scalars if t.device == device]).max() for device in devices]


class Keeper(ModelCheckpoint):
    """Lightning's ModelCheckpoint, saving as ``save`` does; for arguments see there."""

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not save(trainer, Path(filepath), self.save_weights_only):
            return
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
