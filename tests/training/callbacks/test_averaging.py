"""Averaged weights: what they are, what is measured and kept with them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy
from many_ranks import DENSE, Descent
from torch import Tensor
from torch.utils.data import DataLoader

from blockwright.registry import ConfigError
from blockwright.training.callbacks.step_end import Averaging
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.parse import parse_settings
from blockwright.training.entry.preflight import check
from blockwright.training.schedulers import Constant
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.making import Setup

ROWS = torch.arange(24).view(2, 12)
BATCH = {"tokens": ROWS % 11, "targets": (ROWS + 1) % 11, "n_bytes": torch.tensor([12, 12])}


class Watch(L.Callback):
    """The weights after each step, and those that each validation has."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        self.after.append(weights(task))

    def on_validation_batch_start(self, trainer: Any, task: Any, *_: Any) -> None:
        self.validated.append(weights(task))


def weights(task: CausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in task.model.named_parameters()}


def fit(
    folder: Path, *callbacks: L.Callback, steps: int = 5, model: Any = DENSE, precision: Any = "32-true"
) -> tuple[L.Trainer, CausalLM, Watch]:
    watch = Watch()
    task = CausalLM(Setup(model=model, optimizer=Descent(), scheduler=Constant(), seed=0))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    counted: dict[str, Any] = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    given = {
        "default_root_dir": str(folder),
        "max_steps": steps,
        "accelerator": "cpu",
        "devices": 1,
        "precision": precision,
    }
    trainer = L.Trainer(**off, **counted, **given, callbacks=[*callbacks, watch])
    loaders = [DataLoader([BATCH] * n, batch_size=None) for n in (steps, 1)]  # type: ignore[arg-type]
    trainer.fit(task, *loaders)
    return trainer, task, watch


def averaged(after: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The formula, written out."""
    mean = after[0]
    for now in after[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * now[name] for name in mean}
    return mean


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[name].to(b[name].dtype), b[name], rtol=1e-5, atol=1e-7) for name in b)


def test_validation_and_the_end_have_the_average_and_training_is_unchanged(tmp_path: Path) -> None:
    _, task, watch = fit(tmp_path, Averaging(decay=0.7))
    _, plain, usual = fit(tmp_path)
    assert all(alike(a, b) for a, b in zip(watch.after, usual.after, strict=True))
    assert alike(watch.validated[0], averaged(watch.after[:3], 0.7)) and not alike(watch.validated[0], watch.after[2])
    assert alike(weights(task), averaged(watch.after, 0.7)) and not alike(weights(task), weights(plain))
    # Steps before the first are left out.
    _, task, watch = fit(tmp_path, Averaging(decay=0.7, from_step=2))
    assert alike(weights(task), averaged(watch.after[2:], 0.7))
    # Before it begins, the current weights are measured and kept.
    _, task, watch = fit(tmp_path, Averaging(decay=0.7, from_step=4))
    assert alike(watch.validated[0], watch.after[2]) and alike(weights(task), watch.after[4])
    _, task, watch = fit(tmp_path, Averaging(decay=0.7, from_step=9))
    assert alike(watch.validated[0], watch.after[2]) and alike(weights(task), watch.after[4])


class Save(L.Callback):
    """Saves amid the validation, and after training."""

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "amid.ckpt")

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "end.ckpt")


def stored(folder: Path, name: str, key: str) -> dict[str, Tensor]:
    state = torch.load(folder / name, weights_only=True)[key]
    return {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")}


def test_a_checkpoint_tells_the_average_from_the_current_weights(tmp_path: Path) -> None:
    _, _, watch = fit(tmp_path, Averaging(decay=0.7), Save())
    for name, steps in (("amid.ckpt", 3), ("end.ckpt", 5)):
        assert alike(stored(tmp_path, name, "state_dict"), averaged(watch.after[:steps], 0.7))
        assert alike(stored(tmp_path, name, "current_model_state"), watch.after[steps - 1])


def test_shards_and_what_averages_nothing_are_refused() -> None:
    trainer: Any = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ConfigError) as refused:
        Averaging().setup(trainer, L.LightningModule(), "fit")
    assert refused.value.path == "callbacks.averaging"
    for key, value in (("decay", 1.0), ("decay", 0.0), ("from_step", -1)):
        with pytest.raises(ConfigError) as refused:
            Averaging(**{key: value})
        assert refused.value.path == f"callbacks.averaging.{key}"


@pytest.mark.slow
def test_it_is_refused_with_shards_before_a_process_starts() -> None:
    run = parse_settings(compose_config(["trainer=[fsdp,sim]", "callbacks=averaging"], output_dir="."))
    with pytest.raises(ConfigError) as refused:
        check(run)
    assert refused.value.path == "callbacks.averaging" and "trainer=ddp" in refused.value.remedy


def test_the_average_of_weights_in_bf16_is_kept_in_fp32_through_validations(tmp_path: Path) -> None:
    averaging = Averaging(decay=0.9)
    _, task, watch = fit(tmp_path, averaging, Save(), steps=20, precision="bf16-true")
    assert all(p.dtype == torch.bfloat16 for p in task.model.parameters())
    steps = [{name: p.float() for name, p in after.items()} for after in watch.after]
    for name, until in (("amid.ckpt", 18), ("end.ckpt", 20)):
        assert alike(stored(tmp_path, name, "state_dict"), averaged(steps[:until], 0.9))
        assert alike(stored(tmp_path, name, "current_model_state"), steps[until - 1])
    mean = averaged(steps, 0.9)
    assert all(torch.allclose(p.float(), mean[name], rtol=2**-8) for name, p in weights(task).items())


def test_tables_of_whole_numbers_and_constants_are_left_as_they_are(tmp_path: Path) -> None:
    moe = {"ffn": {"name": "moe", "n_experts": 8}, "experts": {"name": "swiglu", "d_ff": 16}, "gating": "hash"}
    mixture = yaml.safe_load(DENSE) | moe
    _, task, _ = fit(tmp_path, Averaging(decay=0.9), steps=20, model=mixture)
    fresh = CausalLM(Setup(model=mixture, optimizer=Descent(), scheduler=Constant(), seed=0))
    fresh.configure_model()
    drawn = dict(fresh.model.named_buffers())
    assert any(not buffer.is_floating_point() for buffer in drawn.values())
    for name, buffer in task.model.named_buffers():
        assert torch.equal(buffer, drawn[name]) or name.endswith("moved"), name
