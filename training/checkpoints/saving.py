"""One way to save a trainer's state, whatever its strategy: whole or not at all, and never worse than what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blocks.checkpoint import manifest
from training.checkpoints import together
from training.checkpoints.atomic import partial_of, put_in_place, refused_if_unwritable
from training.checkpoints.carry import carry
from training.checkpoints.plugin import SealedCheckpoints
from training.checkpoints.record import peek


def save(trainer: L.Trainer, path: Path, weights_only: bool | None = False) -> bool:
    """Save the state of training; to be called on all ranks.

    A strategy that leaves files to the trainer's CheckpointIO has them written whole there. One that writes a format
    of its own (a folder of shards, say) writes beside the place; each rank digests its share, and rank 0 seals and
    renames.

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
        if trainer.is_global_zero and isinstance(strategy.checkpoint_io, SealedCheckpoints):
            strategy.checkpoint_io.wait()
        is_folder = strategy.broadcast(partial.is_dir())
        digests = together.seal(partial) if is_folder else None
        if trainer.is_global_zero:
            if digests is not None:
                manifest.seal_folder(partial, digests)
            put_in_place(partial, path, verify=not is_folder)
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
    """Lightning's ModelCheckpoint, saving as ``save`` does; for arguments see there.

    How this differs from Lightning's: a run that resumes in another folder keeps its best checkpoints and their scores.
    The files are carried over from the folder of the checkpoint that it resumes from. One that is missing there, or of
    a later step than that checkpoint, is not of this run's past: it and its score are left out, with a warning.
    """

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        past = checkpoint["callbacks"].get(self.state_key)
        if past is None or trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        step = checkpoint["global_step"]
        found = self._carried(trainer, past["best_k_models"], step) if trainer.is_global_zero else {}
        self._restore(trainer.strategy.broadcast(found))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is left to do: see ``on_load_checkpoint``."""

    def _carried(self, trainer: L.Trainer, past: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Path here → score of each best checkpoint of the past that is no later than ``step``, where training is."""
        found = {}
        for path, score in past.items():
            beside = Path(str(trainer.ckpt_path)).parent / Path(path).name
            old = beside if beside.exists() else Path(path)
            known, new = peek(old), Path(str(self.dirpath)) / old.name
            if known is None or known.step > step:
                what = "cannot be read" if known is None else f"is of step {known.step}"
                rank_zero_warn(f"{old} {what}: the best checkpoint is searched anew from step {step}")
                continue
            try:
                carry(old, new)
                found[str(new)] = score
            except OSError as error:
                rank_zero_warn(f"{old} could not be carried over to {new.parent} ({error.strerror or error})")
        return found

    def _restore(self, models: dict[str, Tensor]) -> None:
        if not models:
            return
        best, worst = (min, max) if self.mode == "min" else (max, min)
        self.best_k_models = models
        self.best_model_path = best(models, key=models.__getitem__)
        self.best_model_score = models[self.best_model_path]
        if len(models) == self.save_top_k:
            self.kth_best_model_path = worst(models, key=models.__getitem__)
            self.kth_value = models[self.kth_best_model_path]

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not save(trainer, Path(filepath), self.save_weights_only):
            return
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
