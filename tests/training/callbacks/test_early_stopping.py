"""Early stopping continues its count in a resumed run, with the patience that is configured now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest

from blockwright.training.callbacks.early_stopping import EarlyStopping
from blockwright.training.callbacks.interruption import Interruption

WORSE = ("optimizer.lr=3.0", "scheduler=constant", "trainer.max_steps=6")
EACH = {"enable_checkpointing": True, "limit_val_batches": 1, "val_check_interval": 1}


@pytest.mark.slow
def test_resumed_run_keeps_its_count_and_takes_the_patience_of_now(
    fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    first = EarlyStopping("val/loss", min_delta=100.0, patience=2)  # nothing is ever an improvement
    ended = fit(*WORSE, callbacks=[first, Interruption()], **EACH)
    assert ended.global_step == 3 and first.wait_count == 2
    last = tmp_path / "checkpoints" / "last.ckpt"
    same = fit(*WORSE, callbacks=[EarlyStopping("val/loss", min_delta=100.0, patience=2)], ckpt_path=last, **EACH)
    assert same.global_step == 3  # ended it was, ended it is
    longer = fit(*WORSE, callbacks=[EarlyStopping("val/loss", min_delta=100.0, patience=3)], ckpt_path=last, **EACH)
    assert longer.global_step == 4


@pytest.mark.slow
def test_patience_of_zero_ends_with_the_first_validation_that_is_no_better(fit: Callable[..., L.Trainer]) -> None:
    stopped = fit(*WORSE, callbacks=[EarlyStopping("val/loss", min_delta=100.0, patience=0)], **EACH)
    assert stopped.global_step == 2  # the first is better than nothing
