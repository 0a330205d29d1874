"""Ends of a run before its last step: after a signal, with a checkpoint to resume from, or where a metric stays."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.trainer.states import TrainerFn

from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count
from blockwright.training.checkpoints.atomic import clean, clean_folder
from blockwright.training.checkpoints.find import LAST, milestone
from blockwright.training.checkpoints.record import KEY
from blockwright.training.checkpoints.saving import save
from blockwright.training.configuration.run import FOLDER
from blockwright.training.figure import mode_in
from blockwright.training.processes import queue_again
from blockwright.training.result import SIGNALS, Interrupted


@enforced("callbacks.interruption")
class Interruption(Checkpoint):
    """Keeps ``last.ckpt`` up to date: at each validation, at the last step, and at the step where the run stops.

    Lightning's own ``save_last`` follows the best checkpoint: without improvement it saves nothing, and the last step
    only if a validation falls on it.

    A KeyboardInterrupt in the middle of a backward pass leaves nothing worth saving, and Lightning saves nothing on
    SIGTERM; here the signal (SIGINT, SIGTERM or SIGUSR1) is only noted, and handled after the optimizer step or
    validation batch. A second Ctrl-C stops at once, without saving. With several processes the ranks agree first.
    Under Slurm, the signal that announces the time limit (Lightning's ``requeue_signal``) also queues the job again.

    As a ``Checkpoint`` it runs after all other callbacks, whose states it saves.

    Args:
        every_n_steps: optimizer steps between additional saves; null for none
    """

    def __init__(self, every_n_steps: Count | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._stopping = False  # agreed between ranks
        self.slowest_s = 0.0  # seconds of the slowest save, which a grace period must leave time for
        self._saved = -1  # optimizer steps done when last saved
        self._owed = False  # a validation within a step defers its save to the end of the step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            run = Path(trainer.default_root_dir)
            clean(run.parent)  # leftovers of killed processes, of sibling runs too
            clean_folder(last_checkpoint(trainer).parent)
            # Link a run's folder to its checkpoints if they are kept elsewhere
            checkpoints = last_checkpoint(trainer).parent
            usual = run / FOLDER
            if not usual.exists() and not usual.is_symlink() and checkpoints.resolve() != usual.resolve():
                with suppress(OSError):  # no links on this file system
                    usual.parent.mkdir(parents=True, exist_ok=True)
                    usual.symlink_to(checkpoints.resolve(), target_is_directory=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After Lightning has set its own handlers, which would end the loop without a checkpoint.
        self._signum, self._stopping, self._saved = None, False, trainer.global_step
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise SystemExit(128 + signum)  # Lightning would turn a KeyboardInterrupt into exit code 1
        self._signum = signum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wanted = self._agreed(trainer, self._signum is not None)
        if trainer.fit_loop._should_accumulate():
            return
        due = self._owed or (self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0)
        # The last step is saved here, not at the end of training, where Lightning also counts the epoch as ended.
        if wanted or due or trainer.global_step == trainer.max_steps:
            self._save(trainer)
        self._stopping = wanted

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._between_steps(trainer):
            self._stopping = self._agreed(trainer, self._signum is not None)
            if self._stopping:
                with _validation_not_begun(trainer):
                    self._save(trainer)
                self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._between_steps(trainer):
            self._save(trainer)
            self._stopping = self._agreed(trainer, self._signum is not None)
            self._stop_if_asked(trainer)
        elif trainer.state.fn == TrainerFn.FITTING:
            self._owed = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saved != trainer.global_step:  # ended by epochs, time or another callback
            self._save(trainer)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        """After the step's logging, and its validation where one is due, so that a resumed run does not lack them."""
        if self._stopping:
            signum = self._signum or signal.SIGTERM
            slurm = trainer._accelerator_connector.cluster_environment
            requeue = slurm.requeue_signal if isinstance(slurm, SLURMEnvironment) and slurm.auto_requeue else None
            if requeue is not None and self._agreed(trainer, signum == requeue):
                # Lightning's handler would also leave a second checkpoint, which it prefers to weights in memory.
                if trainer.is_global_zero:
                    queue_again()
                trainer.strategy.barrier("queued again")  # srun may end all tasks as soon as one has ended
            raise Interrupted(last_checkpoint(trainer), trainer.global_step, signum)

    @staticmethod
    def _between_steps(trainer: L.Trainer) -> bool:
        """Whether no optimizer step is half done: no file stores the sum over its micro-batches."""
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        return training and not trainer.fit_loop._should_accumulate()

    def _save(self, trainer: L.Trainer) -> None:
        self._owed = False
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._saved, began = trainer.global_step, time.monotonic()
            save(trainer, last_checkpoint(trainer))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    @staticmethod
    def _agreed(trainer: L.Trainer, decision: bool) -> bool:
        """Whether any rank decides so; the same on all."""
        return trainer.strategy.reduce_boolean_decision(decision, all=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._note:  # else Lightning has restored the previous handler
                signal.signal(signum, handler)
        self._previous.clear()


@contextmanager
def _validation_not_begun(trainer: L.Trainer) -> Iterator[None]:
    """Put the loop into its state before the first batch of this validation.

    A checkpoint does not contain partial validation results, so a resumed run must repeat the validation; Lightning
    would treat the rest of it as the whole.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    now = progress.state_dict()
    begun = progress.total.completed - progress.current.completed
    amid = {"ready": begun + 1, "started": begun + 1, "processed": begun, "completed": begun}
    none = dict.fromkeys(amid, 0)
    progress.load_state_dict({**now, "total": amid, "current": none})
    try:
        yield
    finally:
        progress.load_state_dict(now)


def last_checkpoint(trainer: L.Trainer) -> Path:
    """Where a stopped run leaves its checkpoint."""
    keeper = trainer.checkpoint_callback
    folder = getattr(keeper, "dirpath", None) or Path(trainer.default_root_dir) / FOLDER
    return Path(folder) / LAST


# --- checkpoints of chosen steps, which later runs branch off from ---


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


# --- store the configuration in every checkpoint, to compare it with that of a resuming run ---


class Recording(L.Callback):
    """Writes the settings that determine the numbers of a run into its checkpoints.

    Args:
        settings: from ``blockwright.training.checkpoints.record.record``
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.settings


class EarlyStopping(LightningEarlyStopping):
    """Lightning's EarlyStopping, with the same arguments.

    How this differs from Lightning's: whether more or less is better follows from the figure; a resumed run uses the
    configured patience, not that of the checkpoint; and a run already stopped by it stops again at once when resumed,
    not at the next validation.

    Args:
        args, settings: those of Lightning's
        mode: ``min`` or ``max``, of a figure that no task and no callback declares; else null
    """

    def __init__(self, *args: Any, mode: Literal["min", "max"] | None = None, **settings: Any) -> None:
        super().__init__(*args, mode=mode or "min", **settings)  # type: ignore[misc] # jsonargparse reads this call
        self.asked_mode = mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        mode = mode_in(trainer, "callbacks.early_stopping", self.monitor, self.asked_mode)
        if mode != self.mode:
            self.mode, self.min_delta, self.best_score = mode, -self.min_delta, -self.best_score
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.wait_count >= max(1, self.patience):  # a patience of 0 ends with the first that is no better
            trainer.should_stop = True
