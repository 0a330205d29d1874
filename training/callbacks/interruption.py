"""Ctrl-C and SIGTERM end a run at the next step boundary, with a checkpoint that continues it exactly."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L


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


class Interruption(L.Callback):
    """Saves ``last.ckpt`` and stops when asked to.

    A KeyboardInterrupt in the middle of a backward pass leaves nothing worth saving, and Lightning saves nothing on
    SIGTERM; here the signal is only noted, and acted upon when the optimizer has stepped. A second Ctrl-C stops at
    once, without saving. Under several processes the ranks agree first.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After Lightning has set its own handlers, which would end the loop without a checkpoint.
        self._signum = None
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signum = signum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wanted = trainer.strategy.reduce_boolean_decision(self._signum is not None, all=False)
        if wanted and not trainer.fit_loop._should_accumulate():
            path = self._path(trainer)
            trainer.save_checkpoint(path)
            raise Interrupted(path, trainer.global_step, self._signum or signal.SIGTERM)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        keeper = trainer.checkpoint_callback
        folder = getattr(keeper, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        return Path(folder) / "last.ckpt"
