"""Validation of several sources: each one's loss by itself, their mean by weights, and figures of the data itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import tensor

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.training.configuration import figures
from blockwright.training.data.tokenizers.bytes import Bytes
from blockwright.training.figure import find, of_run
from blockwright.training.metrics import TokenLoss
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers.constant import Constant
from blockwright.training.tasks.by_source import BySource
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.setup import Setup
from tests import built
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents


def test_the_mean_is_that_of_the_sources_by_their_weights():
    losses = BySource()
    losses.begin({"a": 0.25, "b": 0.75, "c": 0}, torch.device("cpu"))
    for loader, nll, tokens in ((0, 10.0, 5), (0, 2.0, 1), (1, 3.0, 3), (2, 9.0, 1)):
        losses.add(loader, tensor(nll), tensor(tokens), tensor(tokens * 2))
    found = {name: float(value) for name, value in losses.figures().items()}
    assert found["a/loss"] == 2 and found["b/loss"] == 1 and found["c/loss"] == 9
    assert found["loss"] == pytest.approx(0.25 * 2 + 0.75 * 1)  # not by tokens
    assert found["perplexity"] == pytest.approx(2.718281828**1.25)
    assert found["bits_per_byte"] == pytest.approx(0.25 * found["a/bits_per_byte"] + 0.75 * found["b/bits_per_byte"])


def test_a_loader_without_a_name_has_no_figures_of_its_own():
    losses = BySource()
    losses.begin({}, torch.device("cpu"))
    losses.add(0, tensor(1.0), tensor(1), tensor(1))
    assert losses.figures() == {}


@pytest.mark.slow
def test_a_training_logs_each_source_and_what_was_read_of_it(tiny: Callable[..., dict[str, Any]], tmp_path: Path):
    formats.npy(tmp_path / "a.npy", documents(60, 1))
    formats.npy(tmp_path / "b.npy", documents(60, 2, b"0123456789"))
    sources = {name: {"files": str(tmp_path / f"{name}.npy"), "val_tokens": 200} for name in "ab"}
    data = built.data("mixture", tokenizer=Bytes(257), sources=sources, sequence_length=12, batch_size=2)
    task = CausalLM(Setup(tiny(False, vocab_size=257), AdamW(lr=0.01), Constant(1), 0))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        val_check_interval=4,
        use_distributed_sampler=False,
    )
    trainer.fit(task, data)
    logged = trainer.callback_metrics
    assert logged["data/a/tokens"] + logged["data/b/tokens"] == 4 * 2 * 12
    for name, loader in zip("ab", data.val_dataloader(), strict=True):
        loss = TokenLoss()
        for batch in loader:
            hidden = task.model.hidden(batch["tokens"], batch.get("positions"), batch.get("segments"))[0]
            scored = (batch["targets"] != IGNORED).sum()
            loss.update(task.model.nll(hidden, batch["targets"]), scored, batch["n_bytes"].sum())
        for key in ("loss", "bits_per_byte"):
            assert float(logged[f"val/{name}/{key}"]) == pytest.approx(float(loss.compute()[key]), rel=1e-5)
    assert float(logged["val/loss"]) == pytest.approx(float(logged["val/a/loss"] + logged["val/b/loss"]) / 2, rel=1e-5)
    assert (
        find("val/a/loss", of_run(trainer)).better == "less" and find("data/a/epochs", of_run(trainer)).better is None
    )


def test_a_figure_of_a_source_has_a_direction_before_the_run():
    plain = {"callbacks": {}, "data": {"name": "mixture"}, "task": {"name": "causal_lm"}}
    assert figures.declaration("val/web/bits_per_byte", plain).better == "less"
    assert figures.declaration("val/web/bits_per_byte", {**plain, "data": {"name": "text"}}) is None
