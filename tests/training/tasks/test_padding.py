"""Padding is no token: it changes no figure, loss, load, bias or weight of any task. Every gate, balance loss and
selector by itself is checked for it by the conformance check ``padding``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.kernels.scoring import PADDING
from blockwright.blocks.layer import Layer
from blockwright.registry import ConfigError
from blockwright.training.callbacks.step_end import QKClip
from blockwright.training.data.corpora import Sorting
from blockwright.training.data.modules.chat import ChatDataModule
from blockwright.training.data.tokenizers.tokenizer import Chars
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import Constant
from tests import built
from tests.training.parallel.quiet import quiet_trainer

Make = Callable[..., Any]
COLUMNS, ROWS = 3, 2  # of padding that is added
FILL = {"segments": PADDING, "targets": -100, "sequence": -1, "tokens": 5}


class Case(NamedTuple):
    """A task on padded batches.

    data, corpus: its data module, and the class of its corpus
    settings: of the task; START stands for a checkpoint
    model: blocks other than those of the usual model
    """

    data: str
    corpus: type
    settings: Mapping[str, Any]
    model: Mapping[str, Any] = MappingProxyType({})


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """Every task of the core; those of a plug-in are in its tests."""
    return {task: Case("chat", Sorting, {}) for task in ("causal_lm", "recall")}


def test_every_task_of_the_core_is_tested(cases: dict[str, Case]) -> None:
    assert sorted(cases) == built.names("task", "blockwright.training")


class Padded:
    """A data set whose batches have more columns of padding, and more rows, than those of another."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[Any]) -> dict[str, Tensor]:
        batch = self.data.__getitems__(rows)
        if "targets" not in batch:  # prompts, which are no rows of training
            return {**batch, "tokens": F.pad(batch["tokens"], (0, COLUMNS), value=5)}
        shape = batch["tokens"].shape
        batch.setdefault("segments", torch.zeros(shape, dtype=torch.int64))
        return {name: widened(t, FILL.get(name, 0)) if t.shape == shape else t for name, t in batch.items()}

    __getitem__ = __getitems__


def widened(values: Tensor, fill: int) -> Tensor:
    return F.pad(values, (0, COLUMNS, 0, ROWS), value=fill)


class Watch(L.Callback):
    """What was logged, and how many tokens per step counts for figures of speed."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        own = {**trainer.callback_metrics, "tokens": task.tokens_of(batch)}
        self.figures |= {f"{batch_idx} {name}": float(value) for name, value in own.items()}


@pytest.fixture(scope="module")
def train(cases: dict[str, Case], tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("padding")
    balances = [{"name": name, **_of_devices(name)} for name in registry.names("balance")]
    selector = {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 4}
    gating = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.125, "balance": balances}
    attention = {"name": "gqa", "selector": selector}
    model = tiny(moe=True, vocab_size=16, init={"std": 0.3}, attention=attention, gating=gating)

    def run(name: str, steps: int = 1, **more: Any) -> tuple[Any, dict[str, float], L.Trainer]:
        case = cases.get(name, Case("chat", Sorting, {}))
        settings = {k: str(folder / "start.ckpt") if v == "START" else v for k, v in case.settings.items()}
        made = built.task(name, {**model, **case.model}, AdamW(lr=3e-3), Constant(warmup=1), **settings, **more)
        rows = {"tokenizer": Chars(16), "sequence_length": 24, "batch_size": 4, "cache_dir": str(folder / "cache")}
        data, watch = built.data(case.data, corpus=case.corpus(train=24, held_out=6), **rows), Watch()
        every = {"log_every_n_steps": 1, "val_check_interval": steps, "num_sanity_val_steps": 0}
        callbacks = [QKClip(threshold=0.5), watch]
        trainer = quiet_trainer(max_steps=steps, callbacks=callbacks, default_root_dir=folder, **every)
        trainer.fit(made, data)
        validated = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        return made, {**watch.figures, **validated}, trainer

    _, _, trainer = run("causal_lm")
    trainer.save_checkpoint(folder / "start.ckpt")
    return run


def _of_devices(name: str) -> dict[str, int]:
    devices = {"device": {"n_devices": 2}, "communication": {"n_devices": 2, "top_devices": 1}}
    return devices.get(name, {})


def pad(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    """Widen the batches of data modules."""
    for cls in modules:
        monkeypatch.setattr(cls, "_dataset", lambda self, *a, dataset=cls._dataset: Padded(dataset(self, *a)))


def assert_padding_changes_nothing(train: Make, name: str, widen: Callable[[], None]) -> None:
    """Train a task without and with padding."""
    plain, expected, _ = train(name)
    widen()
    padded, found, _ = train(name)
    assert any("max_violation" in key for key in expected) and any("tokens" in key for key in expected)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for (key, right), got in zip(plain.model.state_dict().items(), padded.model.state_dict().values(), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=2e-4, msg=lambda said, key=key: f"{key}: {said}")
    moved = [int(b) for key, b in padded.model.named_buffers() if key.endswith("gating.moved")]
    assert moved and all(moved)


def assert_compiled_where_batches_have_one_shape(train: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Else each batch would be compiled, and, of a rollout, each token."""
    shapes, forward = set(), Layer.forward
    monkeypatch.setattr(
        Layer, "forward", lambda self, x, *a, **k: (shapes.add((self.training, x.shape)), forward(self, x, *a, **k))[1]
    )
    made, _, _ = train(name, steps=2)
    assert (len({shape for training, shape in shapes if training}) <= 1) is made.steady
    if not made.steady:
        with pytest.raises(ConfigError, match=r"trainer\.compile.* another"):
            train(name, compile=True)


def test_padding_changes_nothing(train: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_padding_changes_nothing(train, "causal_lm", lambda: pad(monkeypatch, ChatDataModule))


@pytest.mark.slow
def test_layers_are_compiled_where_batches_have_one_shape(train: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_compiled_where_batches_have_one_shape(train, monkeypatch, "causal_lm")
