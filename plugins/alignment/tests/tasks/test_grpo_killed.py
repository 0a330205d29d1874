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

import blockwright.plugins.alignment.rollouts.engine.native as native
import blockwright.training.checkpoints.atomic as atomic
from blockwright import registry
from blockwright.plugins.alignment.rewards.base import Reward
from blockwright.plugins.alignment.tasks.grpo import Grpo
from blockwright.training.checkpoints.plugin import SealedCheckpoints
from blockwright.training.data.sorting import Sorting
from blockwright.training.data.tokenizers.chars import Chars
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers.constant import Constant
from tests import built

STEPS = 6
PHASES = ("rollout", "reward", "update", "save", "rename")


class Brief(Reward):
    """1 for a completion of less than four characters."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [float(len(text) < 4) for text in completions]


class Saving(L.Callback):
    """Saves after every step, and keeps the weights after the last."""

    def __init__(self, file: Path) -> None:
        self.file, self.weights = file, torch.empty(0)

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.file)
        self.weights = torch.cat([p.detach().flatten().clone() for p in task.model.parameters()])


def kill_at(call: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    """A function that ends its process with the n-th call."""
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)

    return counted


def arm(phase: str) -> None:
    """Let this process die in the middle of a phase, after the first step."""
    if phase == "rollout":  # of six forward passes, at most twice
        native.read = kill_at(14, native.read)  # type: ignore[attr-defined]
    elif phase == "reward":
        Brief.__call__ = kill_at(3, Brief.__call__)  # type: ignore[method-assign] # at most two a rollout
    elif phase == "update":
        Grpo.backward = kill_at(4, Grpo.backward)  # type: ignore[method-assign]
    elif phase == "save":
        torch.save = kill_at(4, torch.save)
    else:
        atomic.os.replace = kill_at(3, os.replace)  # type: ignore[attr-defined]


@pytest.fixture
def fit(tiny: Callable[..., Any], tmp_path: Path, temporary_blocks: None) -> Callable[..., torch.Tensor]:
    registry.register("reward", "brief")(Brief)

    def run(folder: str, resume: bool = False) -> torch.Tensor:
        model = tiny(moe=True, vocab_size=16, init={"std": 0.3})
        task = built.task(
            "grpo",
            model,
            AdamW(lr=3e-3, weight_decay=0.0),
            Constant(warmup=1),
            reward="brief",
            group_size=4,
            max_new_tokens=6,
            resamples=1,
            top_p=0.9,
        )
        data = built.data(
            "prompts",
            corpus=Sorting(train=40, held_out=4, salt=1),
            tokenizer=Chars(16),
            sequence_length=12,
            batch_size=4,
            updates=2,
            cache_dir=str(tmp_path / "cache"),
        )
        saving = Saving(tmp_path / folder / "last.ckpt")
        trainer = L.Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            max_steps=STEPS,
            max_epochs=-1,
            limit_val_batches=0,
            callbacks=[saving],
            plugins=[SealedCheckpoints(asynchronous=False)],
            use_distributed_sampler=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(task, data, ckpt_path=saving.file if resume else None, weights_only=True)
        return saving.weights

    return run


@pytest.mark.slow
def test_killed_in_any_phase_it_resumes_bit_identical(fit: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    whole = fit("whole")
    for phase in PHASES:
        process = os.fork()
        if not process:
            try:
                arm(phase)
                fit(phase)
            finally:
                os._exit(0)  # not killed
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, phase
        done = torch.load(tmp_path / phase / "last.ckpt", weights_only=True)["global_step"]
        assert 1 <= done < STEPS, phase
        assert torch.equal(fit(phase, resume=True), whole), phase
