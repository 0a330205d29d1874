"""A checkpoint written at any hook of any task is one of the last optimizer step: resumed, it is the uninterrupted run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

import registry
from training.callbacks.guard import Guard
from training.checkpoints.plugin import SealedCheckpoints
from training.configuration.conf import CONF
from training.configuration.instantiate import find_target
from training.data.chat_module import ChatDataModule
from training.data.preference_module import PreferenceDataModule
from training.data.prompt_module import PromptDataModule
from training.data.sorting import Sorting, SortingPreferences
from training.data.tokenizers.chars import Chars
from training.objectives.reward.base import Reward
from training.optimizers.adamw import AdamW
from training.schedulers.constant import Constant

STEPS = 5
OUTSIDE = ("setup", "teardown", "on_fit_start", "on_fit_end", "on_save", "on_load", "on_exception", "on_sanity")
OUTSIDE += ("on_test", "on_predict", "on_train_end")  # nothing to save yet, or the run has ended
HOOKS = [name for name in dir(L.Callback) if name.startswith("on_") and not name.startswith(OUTSIDE)]
SETTINGS: dict[str, dict[str, Any]] = {  # of a task: what it needs besides a model
    "causal_lm": {"z_loss": 1e-4},
    "distill": {
        "stages": [{"loss": "language", "tokens": 256}, {"loss": "logits", "tokens": 256}, {"loss": "language"}],
    },
    "grpo": {"reward": "brief", "group_size": 4, "max_new_tokens": 4},
    "preference": {},
    "reward": {},
}
DATA: dict[str, Any] = {
    "grpo": (PromptDataModule, Sorting, {"sequence_length": 12, "updates": 2}),
    "preference": (PreferenceDataModule, SortingPreferences, {"sequence_length": 24}),
    "reward": (PreferenceDataModule, SortingPreferences, {"sequence_length": 24}),
}
TEXT = (ChatDataModule, Sorting, {"sequence_length": 16})


class Brief(Reward):
    """1 for a completion of less than three characters."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [float(len(text) < 3) for text in completions]


class Saves(L.Callback):
    """Keeps what would be saved at every hook of training, before any other callback."""

    def __init__(self) -> None:
        self.saved: list[tuple[str, Any]] = []
        self.losses: dict[int, float] = {}

    def save(self, hook: str, trainer: L.Trainer) -> None:
        dumped = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self.saved.append((hook, copy.deepcopy(dumped)))


class Last(Saves):
    """The losses of each step, and the state at the end."""

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[trainer.fit_loop.epoch_loop.total_batch_idx] = float(outputs["loss"])

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        self.save("end", trainer)


def _saving(name: str) -> Any:
    def hook(self: Saves, trainer: L.Trainer, *_: Any) -> None:
        self.save(name, trainer)

    return hook


Everywhere = type("Everywhere", (Saves,), {name: _saving(name) for name in HOOKS})


def tasks() -> dict[str, Any]:
    """Name → class of every task of the configuration."""
    found = {}
    for file in sorted((Path(CONF) / "task").glob("*.yaml")):
        target = yaml.safe_load(file.read_text()).get("_target_")
        if target != "???":
            found[file.stem] = find_target(target, "task")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hooks")


@pytest.fixture(scope="module")
def fit(tiny: Callable[..., Any], folder: Path, blocks_of_the_module: None) -> Callable[..., Last]:
    registry.register("reward", "brief")(Brief)

    def run(
        name: str, steps: int = STEPS, saves: Any = (), ckpt_path: Any = None, accumulate: int = 1, start: Any = None
    ) -> Last:
        gating = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.05}
        model = tiny(moe=True, vocab_size=16, d_model=32, init={"std": 0.3}, gating=gating)
        settings = {**SETTINGS[name], **({} if start is None else {"init_from": str(start)})}
        task = tasks()[name](model, AdamW(lr=3e-3, weight_decay=0.0), Constant(warmup=1), **settings)
        module, corpus, more = DATA.get(name, TEXT)
        data = module(
            corpus=corpus(train=24, held_out=4),
            tokenizer=Chars(16),
            batch_size=8 // accumulate,
            cache_dir=str(folder / "cache"),
            **more,
        )
        last = Last()
        trainer = L.Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            log_every_n_steps=2,
            accumulate_grad_batches=accumulate,
            check_val_every_n_epoch=None,
            val_check_interval=2,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            callbacks=[*saves, Guard(window=2, sigmas=50.0), last],
            plugins=[SealedCheckpoints()],
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
        return last

    return run


@pytest.fixture(scope="module")
def start(fit: Callable[..., Last], folder: Path) -> Path:
    """A checkpoint to start from."""
    last = fit("causal_lm", steps=1)
    torch.save({**last.saved[-1][1]}, folder / "start.ckpt")
    return folder / "start.ckpt"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{i}")
    else:
        yield path, value


def differs(ours: Any, theirs: Any, but: tuple[str, ...] = ()) -> list[str]:
    """The paths at which two checkpoints differ."""
    a, b = (dict(leaves({k: v for k, v in each.items() if k not in but})) for each in (ours, theirs))
    same = {k for k in a.keys() & b.keys() if torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k]))
            if isinstance(a[k], torch.Tensor)} | {k for k in a.keys() & b.keys() if not isinstance(a[k], torch.Tensor) and a[k] == b[k]}
    return sorted((a.keys() | b.keys()) - same)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_explore(fit, start, folder, name, accumulate):
    if name == "grpo" and accumulate == 2:
        return
    saves = Everywhere()
    begins = None if name == "causal_lm" else start
    whole = fit(name, saves=[saves], accumulate=accumulate, start=begins)
    by_step = {}
    for hook, saved in saves.saved:
        by_step.setdefault(saved["global_step"], []).append((hook, saved))
    for step, found in by_step.items():
        first = found[0][1]
        for hook, saved in found[1:]:
            d = differs(saved, first, but=("loops", "epoch", "rollouts", "EverywhereX"))
            if d: print("STATE", name, accumulate, step, hook, d[:6])
    import time
    seen = set()
    for i, (hook, saved) in enumerate(saves.saved):
        if (hook, saved["global_step"]) in seen: continue
        seen.add((hook, saved["global_step"]))
        file = folder / f"{name}.ckpt"
        torch.save(saved, file)
        try:
            on = fit(name, ckpt_path=file, accumulate=accumulate, start=begins)
        except BaseException as e:
            print("RAISED", name, accumulate, hook, saved["global_step"], repr(e)[:200]); continue
        d = differs(on.saved[-1][1], whole.saved[-1][1], but=("loops",))
        l = {k: (v, whole.losses.get(k)) for k, v in on.losses.items() if v != whole.losses.get(k)}
        if d or l: print("RESUME", name, accumulate, hook, saved["global_step"], d[:5], list(l.items())[:2], len(on.losses))
