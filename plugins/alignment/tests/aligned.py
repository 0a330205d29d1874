"""Small runs of post-training: their trainer, their data, and what is seen of their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from blockwright.plugins.alignment.data.preferences import SortingPreferences
from blockwright.plugins.alignment.rewards.rewards import Reward
from blockwright.training.data.corpora import Sorting
from blockwright.training.data.tokenizers.tokenizer import Chars
from tests import built

MLA = {"name": "mla", "n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def trainer(folder: Path, steps: int, **more: Any) -> L.Trainer:
    """Trains so many steps, and validates after the last."""
    settings = {**QUIET, "max_steps": steps, "max_epochs": -1, "log_every_n_steps": 1, "val_check_interval": steps}
    settings |= {"accelerator": "cpu", "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}
    return L.Trainer(**{**settings, "use_distributed_sampler": False, "default_root_dir": folder, **more})


def prompts(folder: Path, updates: int = 1, train: int = 40) -> Any:
    corpus = Sorting(train=train, held_out=4, salt=1)
    sizes = {"sequence_length": 12, "batch_size": 4, "updates": updates, "cache_dir": str(folder / "cache")}
    return built.data("prompts", corpus=corpus, tokenizer=Chars(16), **sizes)


def pairs(folder: Path, batch_size: int = 8, train: int = 40, held_out: int = 6) -> Any:
    corpus = SortingPreferences(train=train, held_out=held_out, falling=0.0)
    sizes = {"sequence_length": 24, "batch_size": batch_size, "cache_dir": str(folder / "cache")}
    return built.data("preferences", corpus=corpus, tokenizer=Chars(16), **sizes)


class Watch(L.Callback):
    """The weights after every step, and the figures of each."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.figures: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in task.model.parameters()]))
        self.figures.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class AfterBackward(L.Callback):
    """Keeps what a function finds in the task after each backward pass."""

    def __init__(self, find: Any) -> None:
        self.find, self.found = find, list[Any]()

    def on_after_backward(self, trainer: L.Trainer, task: Any) -> None:
        self.found.append(self.find(task))


def says(of: Any) -> type[Reward]:
    """A class of rewards that give what a function of a completion gives."""

    class Given(Reward):
        """For tests."""

        def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[Any]:
            return [of(text) for text in completions]

    return Given
