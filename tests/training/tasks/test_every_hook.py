"""A checkpoint written at any hook of any task is that of its step: resumed, it is the uninterrupted run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch

from blockwright.training.callbacks.experts import DeadExperts
from blockwright.training.callbacks.guard import Guard
from blockwright.training.callbacks.step_end import QKClip
from blockwright.training.callbacks.throughput import Throughput
from blockwright.training.checkpoints.saving import SealedCheckpoints
from blockwright.training.data.corpora import Sorting
from blockwright.training.data.tokenizers.tokenizer import Chars
from blockwright.training.figure import find, of_run
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import Constant
from tests import built
from tests.training.parallel.quiet import quiet_trainer

pytestmark = pytest.mark.xdist_group("every_hook")  # its runs are made once

STEPS = 5
Fit = Callable[..., "Last"]
OUTSIDE = ("setup", "teardown", "on_fit_start", "on_fit_end", "on_save", "on_load", "on_exception", "on_sanity")
OUTSIDE += ("on_test", "on_predict", "on_train_start", "on_train_end")  # not set up yet, or ended: see below
HOOKS = [name for name in dir(L.Callback) if name.startswith("on_") and not name.startswith(OUTSIDE)]


class Case(NamedTuple):
    """A task whose checkpoints are compared.

    settings: of the task, besides a model
    data, corpus: its data module, and the class of its corpus
    of_data: settings of the data module
    micro_batches: of a step; a task with several updates of a rollout has one
    """

    settings: Mapping[str, Any]
    data: str = "chat"
    corpus: type = Sorting
    of_data: Mapping[str, Any] = MappingProxyType({"sequence_length": 16})
    micro_batches: int = 2


CAUSAL_LM = Case({"z_loss": 1e-4})


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """Every task of the core; those of a plug-in are in its tests."""
    return {"causal_lm": CAUSAL_LM, "recall": CAUSAL_LM}


class Saves(L.Callback):
    """Keeps what would be saved at every hook of training, before any other callback."""

    def __init__(self) -> None:
        self.saved: list[tuple[str, Any]] = []

    def save(self, hook: str, trainer: L.Trainer) -> None:
        self.saved.append((hook, dumped(trainer)))


def dumped(trainer: L.Trainer) -> dict[str, Any]:
    return copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))


class Last(L.Callback):
    """The loss of each batch, the state at the end, and figures that neither the task nor a callback declares."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.end: dict[str, Any] = {}
        self.undeclared: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[trainer.fit_loop.epoch_loop.total_batch_idx] = float(outputs["loss"])

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        self.end = dumped(trainer)
        logged = {**trainer.callback_metrics, **trainer.logged_metrics}
        self.undeclared = [name for name in logged if find(name, of_run(trainer)) is None]


def _saving(name: str) -> Any:
    def hook(self: Saves, trainer: L.Trainer, *_: Any) -> None:
        self.save(name, trainer)

    return hook


Everywhere = type("Everywhere", (Saves,), {name: _saving(name) for name in HOOKS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hooks")


@pytest.fixture(scope="module")
def fit(cases: dict[str, Case], tiny: Callable[..., Any], folder: Path, blocks_of_the_module: None) -> Fit:
    def run(name, steps=STEPS, saves=(), ckpt_path=None, accumulate=1, start=None):
        gating = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.05}
        model = tiny(moe=True, vocab_size=16, d_model=32, init={"std": 0.3}, gating=gating)
        case = {"causal_lm": CAUSAL_LM, **cases}[name]
        settings = {**case.settings, **({} if start is None else {"init_from": str(start)})}
        task = built.task(name, model, AdamW(lr=3e-3, weight_decay=0.0), Constant(warmup=1), **settings)
        made = {"corpus": case.corpus(train=24, held_out=4), "tokenizer": Chars(16), "batch_size": 8 // accumulate}
        data = built.data(case.data, **made, cache_dir=str(folder / "cache"), **case.of_data)
        last = Last()
        every = {"log_every_n_steps": 2, "check_val_every_n_epoch": None, "val_check_interval": 2}
        guards = [Guard(window=2, sigmas=50.0), QKClip(threshold=0.05), DeadExperts(0.9, 2)]
        trainer = quiet_trainer(
            **{"max_steps": steps, "max_epochs": -1, "limit_val_batches": 1, "num_sanity_val_steps": 0, **every},
            callbacks=[*saves, *guards, last],
            plugins=[SealedCheckpoints()],
            default_root_dir=folder,
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
        return last

    return run


@pytest.fixture(scope="module")
def start(fit: Fit, folder: Path) -> Path:
    """A checkpoint to start from."""
    last = fit("causal_lm", steps=1)
    torch.save(last.end, folder / "start.ckpt")
    return folder / "start.ckpt"


def leaves(value: Any, but: tuple[str, ...], path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is not None:
        for key, inner in items:
            if key not in but:
                yield from leaves(inner, but, f"{path}/{key}")
    else:
        yield path, value


def is_same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def differs(ours: Any, theirs: Any, but: tuple[str, ...] = ()) -> list[str]:
    """The paths at which two checkpoints differ."""
    a, b = (dict(leaves(each, but)) for each in (ours, theirs))
    same = {path for path in a.keys() & b.keys() if is_same(a[path], b[path])}
    return sorted((a.keys() | b.keys()) - same)


NOT_OF_A_STEP = ("loops", "epoch", "batches", "rollouts", "compiled")  # judged by resuming; rollouts are drawn again


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], what: str, but: tuple[str, ...] = ()) -> None:
    assert not (found := differs(ours, theirs, but)), f"{what}: {found[:6]}"


def resume_and_compare(fit: Fit, name: str, accumulate: int, start: Any, saved: tuple[str, Any], whole: Last) -> None:
    hook, checkpoint = saved
    what = f"{name}, {accumulate} micro-batches, {hook} at step {checkpoint['global_step']}"
    file = Path(start).with_name("saved.ckpt")
    torch.save(checkpoint, file)
    on = fit(name, accumulate=accumulate, start=start, ckpt_path=file)
    assert on.losses and on.losses == {k: v for k, v in whole.losses.items() if k >= min(on.losses)}, what
    assert min(on.losses) <= accumulate * (checkpoint["global_step"] + 1), what
    assert_same(on.end, whole.end, what, ("loops", "rollouts"))


def saved_everywhere(fit: Fit, name: str, accumulate: int, start: Any) -> tuple[Last, list[tuple[str, Any]]]:
    saves = Everywhere()
    whole = fit(name, saves=[saves, Throughput(warmup=1)], accumulate=accumulate, start=start)
    assert set(HOOKS) <= {hook for hook, _ in saves.saved}
    return whole, saves.saved


def assert_step_is_saved(fit: Fit, name: str, accumulate: int, start: Path) -> None:
    """All checkpoints of one step are the same, and one amid a step resumes as the uninterrupted run.

    All figures are declared.
    """
    whole, saved = saved_everywhere(fit, name, accumulate, start)
    assert whole.undeclared == []
    first: dict[int, Any] = {}
    for hook, checkpoint in saved:
        step = checkpoint["global_step"]
        same = first.setdefault(step, checkpoint)
        assert_same(checkpoint, same, f"{name}, {hook} at step {step}", NOT_OF_A_STEP)
    amid = [each for each in saved if each[0] == "on_before_optimizer_step" and each[1]["global_step"] == 3]
    resume_and_compare(fit, name, accumulate, start, amid[0], whole)


def assert_resumes_from_every_hook(fit: Fit, name: str, accumulate: int, start: Path) -> None:
    whole, saved = saved_everywhere(fit, name, accumulate, start)
    left = {hook: (hook, checkpoint) for hook, checkpoint in saved if checkpoint["global_step"] < STEPS}
    assert len(left) > len(HOOKS) / 2  # the last time that each is called; the others end a training
    for each in left.values():
        resume_and_compare(fit, name, accumulate, start, each, whole)


class Stops(L.Callback):
    """Ends training after a batch, as a limit on its time does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.after


def assert_resumes_after_a_stop(fit: Fit, name: str, start: Path, hook: str, batches: int) -> None:
    whole, saves = fit(name, accumulate=2, start=start), Everywhere()
    last = fit(name, saves=[saves, Stops(batches)], accumulate=2, start=start)
    saved = {**dict(saves.saved), "on_train_end": last.end}
    resume_and_compare(fit, name, 2, start, (hook, saved[hook]), whole)


def test_every_task_of_the_core_is_tried(cases: dict[str, Case]) -> None:
    assert sorted(cases) == built.names("task", "blockwright.training")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal_lm", "recall"])
def test_checkpoint_of_any_hook_is_that_of_its_step(fit: Fit, start: Path, name: str) -> None:
    assert_step_is_saved(fit, name, 2, start)


@pytest.mark.slow
def test_run_resumes_from_every_hook(fit: Fit, start: Path) -> None:
    assert_resumes_from_every_hook(fit, "causal_lm", 2, start)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "batches"), [("on_train_end", 1), ("on_train_epoch_end", 4)]
)  # amid a step; after one
def test_run_that_its_time_has_ended_resumes(fit: Fit, start: Path, hook: str, batches: int) -> None:
    assert_resumes_after_a_stop(fit, "causal_lm", start, hook, batches)
