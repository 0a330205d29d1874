"""When to log: at every ``log_every_n_steps``-th batch, counted over the whole run and not within an epoch."""

from __future__ import annotations

import lightning as L


def logs_now(trainer: L.Trainer) -> bool:
    """Whether the batch in progress, or just done, is one to log at."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % every == 0
