"""Policy optimisation killed with kill -9 in every phase of a step: resumed, it is the run that was never killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from aligned import prompts, says, trainer

import blockwright.plugins.alignment.rollouts.engine.native as native
import blockwright.training.checkpoints.atomic as atomic
from blockwright import registry
from blockwright.plugins.alignment.tasks.grpo import Grpo
from blockwright.training.checkpoints.saving import SealedCheckpoints
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import Constant
from tests import built

STEPS = 6
PHASES: dict[str, Any] = {  # where a process dies, and with which call, after its first step
    "rollout": (native, "read", 14),  # of six forward passes, at most twice
    "reward": (None, "__call__", 3),  # at most two a rollout
    "update": (Grpo, "backward", 4),
    "save": (torch, "save", 4),
    "rename": (atomic.os, "replace", 3),  # type: ignore[attr-defined]
}
Brief = says(lambda text: float(len(text) < 4))


class Saving(L.Callback):
    """Saves after every step, and keeps the weights after the last."""

    def __init__(self, file: Path) -> None:
        self.file, self.weights = file, torch.empty(0)

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.file)
        self.weights = torch.cat([p.detach().flatten().clone() for p in task.model.parameters()])


def arm(place: Any, name: str, call: int) -> None:
    """Let this process die with the n-th call of a function."""
    place = place or Brief
    inner, calls = getattr(place, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)

    setattr(place, name, counted)


@pytest.fixture
def fit(tiny: Callable[..., Any], tmp_path: Path, temporary_blocks: None) -> Callable[..., torch.Tensor]:
    registry.register("reward", "brief")(Brief)

    def run(folder: str, resume: bool = False) -> torch.Tensor:
        model = tiny(moe=True, vocab_size=16, init={"std": 0.3})
        given = {"reward": "brief", "group_size": 4, "max_new_tokens": 6, "resamples": 1, "top_p": 0.9}
        task = built.task("grpo", model, AdamW(lr=3e-3, weight_decay=0.0), Constant(warmup=1), **given)
        saving = Saving(tmp_path / folder / "last.ckpt")
        sealed = {"plugins": [SealedCheckpoints(asynchronous=False)], "limit_val_batches": 0}
        how = {"callbacks": [saving], "val_check_interval": None, "check_val_every_n_epoch": 1, **sealed}
        ckpt_path = saving.file if resume else None
        trainer(tmp_path, STEPS, **how).fit(task, prompts(tmp_path, 2), ckpt_path=ckpt_path, weights_only=True)
        return saving.weights

    return run


@pytest.mark.slow
def test_killed_in_any_phase_it_resumes_bit_identical(fit: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    whole = fit("whole")
    for phase in PHASES:
        process = os.fork()
        if not process:
            try:
                arm(*PHASES[phase])
                fit(phase)
            finally:
                os._exit(0)  # not killed
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, phase
        done = torch.load(tmp_path / phase / "last.ckpt", weights_only=True)["global_step"]
        assert 1 <= done < STEPS, phase
        assert torch.equal(fit(phase, resume=True), whole), phase
