"""The position in training that a checkpoint holds: between two optimizer steps, whichever hook writes it."""

from __future__ import annotations

from typing import Any

import lightning as L


def between_steps(trainer: L.Trainer, loops: dict[str, Any]) -> None:
    """Put the loops of a checkpoint where a resumed run can continue: at the end of the last optimizer step.

    No file holds the gradients of a step in progress, so all its micro-batches are computed again. Lightning would

    * continue with the rest of them, and count the batch and the step in progress as done;
    * give an epoch of which no batch has begun the batches of the one before, and end it at once;
    * add a batch to an epoch that has ended without a validation;
    * count an epoch as ended in which training was stopped, by its time or a callback.

    Args:
        trainer: at any hook
        loops: the fit loop's state in the checkpoint, changed in place
    """
    loop, batches = trainer.fit_loop.epoch_loop, loops["epoch_loop.batch_progress"]
    now: Any = loop.batch_progress.current  # whose class Lightning does not declare
    epoch: Any = trainer.fit_loop.epoch_progress.current
    both = (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"])
    ended, unbegun = epoch.processed == epoch.ready, epoch.ready > epoch.started
    stopped = ended and epoch.ready > 0 and not loop._num_ready_batches_reached()
    if stopped and trainer.should_stop:
        for counts in both:
            counts["processed"] = counts["completed"] = counts["ready"] - 1
    if not stopped and (ended or unbegun):
        for counts in both:
            counts["completed"] = counts["processed"]
        batches |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}
        return
    if now.ready > now.processed or loop._should_accumulate():
        _back(batches, now.processed % trainer.accumulate_grad_batches)
        step = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        for counts in (step["total"], step["current"]):
            counts["ready"] = counts["completed"]


def _back(batches: dict[str, Any], micro_batches: int) -> None:
    """Take back micro-batches, and the batch in progress."""
    for counts in (batches["total"], batches["current"]):
        counts.update(dict.fromkeys(counts, counts["processed"] - micro_batches))
    batches["is_last_batch"] = False
