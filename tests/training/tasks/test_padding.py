"""Padding is no token: it changes no figure, loss, load, bias or weight of any task. Every gate, balance loss and
selector by itself is checked for it by the conformance check ``padding``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.decoder import Layer
from blockwright.blocks.kernels.documents import PADDING
from blockwright.plugins.alignment.data.prompt_module import PromptDataModule
from blockwright.plugins.alignment.data.sorting import SortingPreferences
from blockwright.plugins.alignment.rollouts import scoring
from blockwright.registry import ConfigError
from blockwright.training.callbacks.qk_clip import QKClip
from blockwright.training.data.modules.chat import ChatDataModule
from blockwright.training.data.modules.text import TextDataModule
from blockwright.training.data.sorting import Sorting
from blockwright.training.data.tokenizers.chars import Chars
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers.constant import Constant
from tests import built

Make = Callable[..., Any]
COLUMNS, ROWS = 3, 2  # of padding that is added
FILL = {"segments": PADDING, "targets": -100, "sequence": -1, "tokens": 5}

# Every task that the configuration offers, with its data and settings: a new one is added here.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal_lm": ("chat", {}),
    "distill": ("chat", {"stages": [{"loss": "layers", "tokens": 200}, {"loss": "logits"}]}),
    "grpo": ("prompts", {"reward": "exact_match", "group_size": 2, "max_new_tokens": 3}),
    "preference": ("preferences", {"preference": "simpo"}),
    "reward": ("preferences", {}),
}


def test_every_task_of_the_configuration_is_tested() -> None:
    assert registry.names("task") == sorted(TASKS)


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


def widen(packed: scoring._Packed) -> None:
    """Add padding to the rows that completions are packed in."""
    width = packed.tokens.shape[1]
    for name in ("tokens", "segments", "positions"):
        setattr(packed, name, widened(getattr(packed, name), FILL.get(name, 0)))
    packed.places = [place // width * (width + COLUMNS) + place % width for place in packed.places]


class Watch(L.Callback):
    """What was logged, and how many tokens per step counts for figures of speed."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        own = {**trainer.callback_metrics, "tokens": task.tokens_of(batch)}
        self.figures |= {f"{batch_idx} {name}": float(value) for name, value in own.items()}


@pytest.fixture(scope="module")
def train(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("padding")
    balances = [{"name": name, **_of_devices(name)} for name in registry.names("balance")]
    selector = {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 4}
    model = tiny(
        moe=True,
        vocab_size=16,
        init={"std": 0.3},
        attention={"name": "gqa", "selector": selector},
        gating={"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.125, "balance": balances},
    )

    def run(name: str, steps: int = 1, **more: Any) -> tuple[Any, dict[str, float], L.Trainer]:
        kind, settings = TASKS[name]
        start = {
            key: str(folder / "start.ckpt") for key in {"grpo": ["init_from"], "distill": ["teacher"]}.get(name, [])
        }
        changed = {"ffn": {**model["ffn"], "n_experts": 8}} if name == "distill" else {}  # else no layer is aligned
        made = built.task(name, {**model, **changed}, AdamW(lr=3e-3), Constant(warmup=1), **settings, **start, **more)
        corpus = SortingPreferences if kind == "preferences" else Sorting
        data = built.data(
            kind,
            corpus=corpus(train=24, held_out=6),
            tokenizer=Chars(16),
            sequence_length=24,
            batch_size=4,
            cache_dir=str(folder / "cache"),
        )
        watch = Watch()
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(
            **quiet,
            accelerator="cpu",
            max_steps=steps,
            log_every_n_steps=1,
            val_check_interval=steps,
            num_sanity_val_steps=0,
            callbacks=[QKClip(threshold=0.5), watch],
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(made, data)
        validated = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        return made, {**watch.figures, **validated}, trainer

    _, _, trainer = run("causal_lm")
    trainer.save_checkpoint(folder / "start.ckpt")
    return run


def _of_devices(name: str) -> dict[str, int]:
    devices = {"device": {"n_devices": 2}, "communication": {"n_devices": 2, "top_devices": 1}}
    return devices.get(name, {})


@pytest.mark.parametrize("name", TASKS)
def test_padding_changes_nothing(train: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain, expected, _ = train(name)
    dataset, pack = TextDataModule._dataset, scoring._Packed.__init__
    for cls in (ChatDataModule, PromptDataModule):
        dataset = cls._dataset
        monkeypatch.setattr(cls, "_dataset", lambda self, *a, dataset=dataset: Padded(dataset(self, *a)))
    monkeypatch.setattr(scoring._Packed, "__init__", lambda self, inputs: (pack(self, inputs), widen(self))[0])
    padded, found, _ = train(name)
    assert any("max_violation" in key for key in expected) and any("tokens" in key for key in expected)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for (key, right), got in zip(plain.model.state_dict().items(), padded.model.state_dict().values(), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=2e-4, msg=lambda said, key=key: f"{key}: {said}")
    moved = [int(b) for key, b in padded.model.named_buffers() if key.endswith("gating.moved")]
    assert moved and all(moved)


@pytest.mark.parametrize("name", TASKS)
def test_layers_are_compiled_where_batches_have_one_shape(
    train: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
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
