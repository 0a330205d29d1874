"""``last.ckpt``: where a run goes on, also after Ctrl-C or SIGTERM, which end it at the next step boundary."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn


class Interrupted(Exception):  # noqa: N818 - a request that was met, not an error
    """Training stopped on request, after its checkpoint was written.

    Args:
        checkpoint: the file to continue from
        step: optimizer steps done
        signum: the signal that asked for it
    """

    def __init__(self, checkpoint: Path, step: int, signum: int) -> None:
        self.checkpoint, self.step, self.signum = checkpoint, step, signum
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")


class Interruption(Checkpoint):
    """Keeps ``last.ckpt`` the newest state: of each validation, of the last step, and of the step at which to stop.

    Lightning's own ``save_last`` follows the best checkpoint: while nothing improves, it saves nothing, and the last
    step only if a validation falls on it.

    A KeyboardInterrupt in the middle of a backward pass leaves nothing worth saving, and Lightning saves nothing on
    SIGTERM; here the signal is only noted, and acted upon when the optimizer has stepped. A second Ctrl-C stops at
    once, without saving. Under several processes the ranks agree first.

    Being a ``Checkpoint``, it comes after all other callbacks, whose states it saves.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._stopping = False  # what the ranks agreed on
        self._saved = -1  # optimizer steps done when last saved

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After Lightning has set its own handlers, which would end the loop without a checkpoint.
        self._signum, self._stopping = None, False
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise SystemExit(128 + signum)  # of a KeyboardInterrupt, Lightning would make an exit code of 1
        self._signum = signum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wanted = trainer.strategy.reduce_boolean_decision(self._signum is not None, all=False)
        if trainer.fit_loop._should_accumulate():
            return
        # The last step is saved here and not when training has ended, where Lightning also counts the epoch as ended.
        if wanted or trainer.global_step == trainer.max_steps:
            self._save(trainer)
        self._stopping = wanted

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saved != trainer.global_step:  # ended by epochs, by time or by another callback
            self._save(trainer)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        """After the step's logging, and after its validation where one is due, lest a run gone on with lack them."""
        if self._stopping:
            raise Interrupted(self._path(trainer), trainer.global_step, self._signum or signal.SIGTERM)

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._saved = trainer.global_step
            trainer.save_checkpoint(self._path(trainer))

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        keeper = trainer.checkpoint_callback
        folder = getattr(keeper, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        return Path(folder) / "last.ckpt"

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._note:  # else Lightning has put back what was there before its own
                signal.signal(signum, handler)
        self._previous.clear()
