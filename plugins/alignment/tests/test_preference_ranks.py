"""Preference optimisation on two ranks: the reference, the steps and the figures of one process; resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from many_ranks import DENSE, MOE, Descent, read_model, spawn

from blockwright.plugins.alignment.data.sorting import SortingPreferences
from blockwright.training.data.tokenizers.chars import Chars
from blockwright.training.parallel.local import whole
from blockwright.training.parallel.strategy import Parallel
from blockwright.training.schedulers.constant import Constant
from tests import built

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("preference_ranks")]

NAMES = ("train/loss", "train/margin", "val/loss", "val/accuracy", "val/chosen", "val/rejected")


def train(
    folder: Path, steps: int, start: Path | None, ckpt_path: Path | None = None, model: str = DENSE, **how: Any
) -> dict[str, Any]:
    loss = "simpo" if start is None else "sigmoid"
    init_from = str(start) if start and not ckpt_path else None
    run = (read_model(model), Descent(), Constant(warmup=1))
    task = built.task("preference", *run, preference=loss, init_from=init_from)
    data = built.data(
        "preferences",
        corpus=SortingPreferences(train=24, held_out=5, falling=0.0),
        tokenizer=Chars(16),
        sequence_length=24,
        batch_size=8,
        cache_dir=str(folder / "cache"),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **how,
    )
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    if ckpt_path is None:
        trainer.save_checkpoint(folder / "stop.ckpt")
    figures = {name: float(trainer.callback_metrics[name]) for name in NAMES}
    weights = {k: whole(v.detach()).clone() for k, v in task.model.named_parameters()}
    return {"figures": figures, "weights": weights, "logs": task._logs}


def on_ranks(folder: Path) -> dict[str, Any]:
    start, two = folder / "dense" / "stop.ckpt", {"devices": 2}
    found = {
        "ddp": train(folder / "ddp", 3, start, strategy="ddp", **two),
        "fsdp": train(folder / "fsdp", 3, start, strategy=Parallel(), **two),
    }
    how: dict[str, Any] = {"model": MOE, "strategy": "ddp", **two}
    start = folder / "moe" / "stop.ckpt"
    uninterrupted = train(folder / "whole", 3, start, **how)
    train(folder / "part", 2, start, **how)
    rest = train(folder / "part", 3, start, folder / "part" / "stop.ckpt", **how)
    return {**found, "whole": uninterrupted, "rest": rest}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    spawn(1, _start, folder)  # threads of a training do not survive the fork that follows
    return {"two": spawn(2, on_ranks, folder), "one": train(folder / "one", 3, folder / "dense" / "stop.ckpt")}


def _start(folder: Path) -> None:
    for name, model in (("dense", DENSE), ("moe", MOE)):
        train(folder / name, 1, None, model=model)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_take_the_steps_of_one(runs: Any, strategy: str) -> None:
    one = runs["one"]
    for rank in (each[strategy] for each in runs["two"]):
        for split, logs in one["logs"].items():
            torch.testing.assert_close(rank["logs"][split], logs, atol=1e-4, rtol=0)
        assert rank["figures"] == pytest.approx(one["figures"], abs=1e-5)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_two_ranks_resume(runs: Any) -> None:
    for rank in runs["two"]:
        assert all(torch.equal(rank["rest"]["weights"][k], v) for k, v in rank["whole"]["weights"].items())
