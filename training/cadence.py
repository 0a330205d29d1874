"""When to log and validate, counted in optimizer steps, where Lightning counts batches.

Steps are counted over the whole run, not within an epoch, so that a resumed run logs at the same steps.
"""

from __future__ import annotations

import math
import sys

import lightning as L

from blockwright.registry import ConfigError

NEVER = sys.maxsize  # batches


def logs_now(trainer: L.Trainer) -> bool:
    """Whether the batch in progress, or just done, ends an optimizer step to log: every ``log_every_n_steps``-th."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    loop = trainer.fit_loop.epoch_loop
    step = loop.automatic_optimization.optim_progress.optimizer.step.total.ready
    return every > 0 and not loop._should_accumulate() and step % every == 0


def validate_by_steps(trainer: L.Trainer, step: int) -> None:
    """Make Lightning validate after the current batch if ``val_check_interval`` steps have passed.

    An interval in steps is not a fixed number of batches, since the last step of an epoch may have fewer. With
    ``check_val_every_n_epoch`` the interval counts from the start of the epoch; a fraction is a fraction of its steps.
    Without either, nothing is validated before the end: Lightning turns the interval ``None`` into one epoch, 1.0.

    Args:
        trainer: at the start of a batch, or of training
        step: optimizer steps of the run after the current batch, if it ends a step

    Raises:
        ConfigError: an epoch has fewer steps than the interval
    """
    interval, loop = trainer.val_check_interval, trainer.fit_loop.epoch_loop
    if trainer.val_check_batch in (None, math.inf):  # counted in time, or once per epoch of unknown length
        return
    if trainer.check_val_every_n_epoch is not None:
        a_step, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
        steps = batches if batches == math.inf else math.ceil(batches / a_step)
        step = math.ceil(loop.batch_progress.current.ready / a_step)
        interval = interval if isinstance(interval, int) else max(1, int(steps * interval))
        if interval > steps and trainer.enable_validation:
            rule = f"counts optimizer steps within an epoch, and an epoch has {steps}"
            remedy = "Lower it, or write trainer.check_val_every_n_epoch=null to count over the whole run"
            raise ConfigError("trainer.val_check_interval", interval, rule, remedy)
    elif not isinstance(interval, int):
        interval = NEVER
    due = not loop._should_accumulate() and step > 0 and step % interval == 0
    trainer.val_check_batch = 1 if due else NEVER
