"""Save a trainer's state with any strategy: atomically, and never replacing a good checkpoint by a bad one.

Files are sealed and hold data only, also those that Lightning writes by itself, through its ``CheckpointIO``.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map_only

from blockwright.blocks.checkpoint import manifest
from blockwright.blocks.checkpoint.read import read_file
from blockwright.blocks.checkpoint.sharded import is_folder, read_folder
from blockwright.registry import ConfigError
from blockwright.registry.folder import replaced
from blockwright.training.checkpoints.atomic import (
    on_first,
    partial_of,
    put_in_place,
    refused_if_unwritable,
    seal,
    write_file,
)
from blockwright.training.checkpoints.find import LAST, PREVIOUS
from blockwright.training.checkpoints.record import peek
from blockwright.training.figure import OF_TEXT, find, mode_in, of_run


class SealedCheckpoints(CheckpointIO):
    """Writes checkpoint files atomically with a digest, and reads nothing but tensors and plain types.

    How this differs from Lightning's: that one stages the file in ``$TMPDIR`` and copies it, so a kill or a full disk
    leaves half of it; and it unpickles files from ``http`` addresses without restriction.

    Args:
        asynchronous: copy the state and write it in a thread while training continues. Costs memory for a copy of the
            state; a save waits for the previous one
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            ConfigError: it, or the previous one, could not be written
        """
        self.wait()
        if not self.asynchronous:
            write_file(checkpoint, Path(path))
            return
        copied = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), checkpoint)
        self._writer = self._writer or ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing = self._writer.submit(write_file, copied, Path(path))

    def wait(self) -> None:
        """Wait for the checkpoint being written.

        Raises:
            ConfigError: it cannot be written
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, always with ``weights_only``.

        Raises:
            ConfigError: a URL, no such file, damaged, or more than tensors and plain types
        """
        self.wait()
        if is_folder(Path(path)):
            return read_folder(Path(path))
        return read_file(
            path, map_location=map_location or "cpu"
        )  # not memory-mapped: optimizers may keep these tensors

    def remove_checkpoint(self, path: str | Path) -> None:
        self.wait()
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None


# --- copy a good checkpoint to another folder, when a run resumes in a new folder ---


def carry(old: Path, new: Path) -> None:
    """Make ``new`` the same checkpoint as ``old``, by hard links if possible, else copies, atomically.

    Raises:
        OSError: there is no ``old``, or ``new`` cannot be written
    """
    if new.exists() and old.resolve() == new.resolve():
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    with replaced(new, partial_of(new)) as partial:
        if old.is_dir():
            shutil.copytree(old, partial, copy_function=_link)
        else:
            _link(old, partial)


def _link(old: Path | str, new: Path | str) -> None:
    try:
        os.link(old, new)  # checkpoints are replaced, never modified, so two names may share one
    except OSError:
        shutil.copyfile(old, new)


def save(trainer: L.Trainer, path: Path, weights_only: bool | None = False) -> bool:
    """Save the state of training; must be called on all ranks.

    Strategies that use the trainer's CheckpointIO get atomic files from it. One that writes its own format (such as a
    sharded folder) writes to a temporary path; each rank digests its share, and rank 0 seals and renames.

    Returns:
        whether it was saved: non-finite weights are not

    Raises:
        ConfigError: it cannot be written
    """
    # Whether all weights of all ranks are finite: each rank checks its own shards
    state = [*trainer.lightning_module.parameters(), *trainer.lightning_module.buffers()]
    held = [t.to_local() if hasattr(t, "to_local") else t for t in state]
    is_finite_everywhere = trainer.strategy.reduce_boolean_decision(all_finite(held), all=True)
    if not is_finite_everywhere:
        rank_zero_warn(f"not saved: some weights are not finite; {path} is unchanged")
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
        digests = seal(partial) if is_folder else None

        def end() -> None:
            if digests is not None:
                manifest.seal_folder(partial, digests)
            put_in_place(partial, path, verify=not is_folder)

        on_first(end)
    strategy.barrier("checkpoint in place")
    return True


@torch.no_grad()
def all_finite(tensors: list[Tensor]) -> bool:
    """Whether floating-point tensors contain no NaN or infinity; synchronises with the device once."""
    largest = [t.detach().abs().max().float() for t in tensors if t.is_floating_point() and t.numel()]
    # The maximum of each device's scalars; NaN if any is NaN
    devices = {t.device for t in largest}
    by_device = [torch.stack([t for t in largest if t.device == device]).max() for device in devices]
    return all(t.isfinite() for t in by_device)


class Keeper(ModelCheckpoint):
    """Lightning's ModelCheckpoint using ``save``, with the same arguments.

    How this differs from Lightning's: whether more or less is better follows from the figure; and a run that resumes in
    another folder keeps its best checkpoints and their scores. The files are carried over from the folder of the
    checkpoint. One that is missing there, or of a later step than the checkpoint, is dropped with its score, with a
    warning.

    Args:
        args, settings: those of ModelCheckpoint; ``filename`` is not that of the newest checkpoint, which would
            take the place of the best
        mode: ``min`` or ``max``, of a figure that no task and no callback declares; else null
    """

    def __init__(self, *args: Any, mode: Literal["min", "max"] | None = None, **settings: Any) -> None:
        super().__init__(*args, mode=mode or "min", **settings)  # type: ignore[misc] # jsonargparse reads this call
        self.asked_mode = mode
        if f"{self.filename}.ckpt" in (LAST, PREVIOUS):
            rule = "is the name of the newest checkpoint, which would take the place of the best"
            raise ConfigError("callbacks.checkpoint.filename", self.filename, rule, "Write another: best")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.monitor is not None and not self._is_unmeasured(trainer):
            mode = mode_in(trainer, "callbacks.checkpoint", self.monitor, self.asked_mode)
            if mode != self.mode:
                self.mode, self.kth_value = mode, -self.kth_value
        super().setup(trainer, pl_module, stage)

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor in monitor_candidates or not self._is_unmeasured(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _is_unmeasured(self, trainer: L.Trainer) -> bool:
        """Whether it monitors a figure of text in a task on something else, such as rewards.

        Such a run has no best checkpoint, as the note before it says.
        """
        return find(str(self.monitor), OF_TEXT) is not None and find(str(self.monitor), of_run(trainer)) is None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        past = checkpoint["callbacks"].get(self.state_key)
        if past is None or trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        step = checkpoint["global_step"]
        found = self._carried(trainer, past["best_k_models"], step) if trainer.is_global_zero else {}
        self._restore(trainer.strategy.broadcast(found))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: see ``on_load_checkpoint``."""

    def _carried(self, trainer: L.Trainer, past: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Path here → score of each best checkpoint not later than ``step``, the current step."""
        found = {}
        for path, score in past.items():
            beside = Path(str(trainer.ckpt_path)).parent / Path(path).name
            old = beside if beside.exists() else Path(path)
            known, new = peek(old), Path(str(self.dirpath)) / old.name
            if known is None or known.step > step:
                what = "cannot be read" if known is None else f"is of step {known.step}"
                rank_zero_warn(f"{old} {what}: the best checkpoint is tracked from step {step} on")
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
