"""The gradient of a step is that of one large batch, however it is divided; losses of sources are weighted means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, tensor
from torch.utils.data import DataLoader, IterableDataset

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.training.callbacks.guard import Guard
from blockwright.training.configuration import figures
from blockwright.training.data.tokenizers.tokenizer import Bytes
from blockwright.training.figure import find, of_run
from blockwright.training.metrics import TokenLoss
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parallel.ranks import DataRanks
from blockwright.training.schedulers import Constant
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.making import Setup
from blockwright.training.tasks.means import BySource, StepMean
from tests import built
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents
from tests.training.parallel.quiet import quiet_trainer

Batch = dict[str, Tensor]
ROWS, LENGTH = 16, 12
GATING = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.125, "balance": [{"name": "expert", "alpha": 0.05}]}
ROUTED = {"moe": True, "mtp": {"depth": 1, "loss_weight": 0.5}}


class Descent(OptimizerRecipe):
    """Gradient descent that hardly moves: every step sees the initial weights."""

    def build(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=1e-12)


def windows(packed: bool = True) -> Batch:
    """Rows whose numbers of scored tokens run from 2 to 12, of two documents each if ``packed``."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(61, (ROWS, LENGTH + 1), generator=draw)
    scored = 2 + torch.arange(ROWS) * 10 // (ROWS - 1)
    place = torch.arange(LENGTH).expand(ROWS, -1)
    targets = tokens[:, 1:].masked_fill(place >= scored[:, None], -100)
    batch = {"tokens": tokens[:, :-1], "targets": targets, "positions": place, "n_bytes": scored}
    if packed:
        second = (place >= torch.randint(1, LENGTH, (ROWS, 1), generator=draw)).long()
        start = (second == 0).sum(1, keepdim=True)
        batch |= {"segments": second, "positions": place - second * start}
    return batch


def cut(batch: Batch, *sizes: int) -> list[Batch]:
    parts = {name: tensor.split(list(sizes)) for name, tensor in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(sizes))]


class Seen(L.Callback):
    """The gradients of every optimizer step, before it is taken, and the last figures logged."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.figures: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.figures.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture
def gradients(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Seen]:
    def train(batches: Any, accumulate: int, callbacks: Any = (), model: Any = ROUTED, **settings: Any) -> Seen:
        seen = Seen()
        ours = {"max_epochs": 1, "log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
        trainer = quiet_trainer(**{**ours, **settings}, default_root_dir=tmp_path, callbacks=[seen, *callbacks])
        loader = batches if isinstance(batches, DataLoader) else DataLoader(batches, batch_size=None)
        trainer.fit(CausalLM(Setup(tiny(**model), Descent(), Constant(1)), z_loss=1e-2), loader)
        return seen

    return train


def far(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in pairs)


@pytest.mark.parametrize(("sizes", "packed"), [((4, 4, 4, 4), False), ((1, 9, 6), True)])
def test_micro_batches_have_the_gradient_of_one_batch(gradients, sizes, packed):
    whole = windows(packed)
    model = {**ROUTED, "gating": GATING}
    one, parts = gradients([whole], 1, model=model), gradients(cut(whole, *sizes), len(sizes), model=model)
    assert len(parts.gradients) == 1
    assert far(parts.gradients[0], one.gradients[0]) < 1e-6
    assert parts.figures[-1] == pytest.approx(one.figures[-1], rel=1e-5)  # train/mtp and the like are of the whole step


@pytest.mark.slow
def test_last_step_of_an_epoch_is_divided_by_what_it_holds(gradients: Callable[..., Seen]) -> None:
    guard, parts = Guard(), cut(windows(), 4, 4, 4, 4)
    seen = gradients(parts, 3, [guard], max_epochs=2)
    alone = gradients([parts[3]], 1)
    assert len(seen.gradients) == 4
    assert far(seen.gradients[1], alone.gradients[0]) < 1e-6
    assert max(guard._seen["loss"]) < 1.1 * min(guard._seen["loss"])


def test_loader_without_a_length_is_read_ahead_too(gradients: Callable[..., Seen]) -> None:
    class Stream(IterableDataset[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            yield from cut(windows(), 1, 7, 3, 5)

    seen = gradients(DataLoader(Stream(), batch_size=None), 3)
    first, last = cut(windows(), 11, 5)
    assert len(seen.gradients) == 2
    alone = gradients([first, last], 1)
    assert max(map(far, seen.gradients, alone.gradients)) < 1e-6


@pytest.mark.slow
def test_limit_of_batches_ends_the_last_step(gradients: Callable[..., Seen]) -> None:
    seen = gradients(cut(windows(), 4, 4, 4, 4), 2, limit_train_batches=3)
    third = cut(windows(), 4, 4, 4, 4)[2]
    assert far(seen.gradients[1], gradients([third], 1).gradients[0]) < 1e-6


def test_micro_batch_without_a_scored_token_counts_for_nothing(gradients: Callable[..., Seen]) -> None:
    whole = windows()
    empty = {**whole, "targets": torch.full_like(whole["targets"], -100)}
    dense = {"moe": False}
    seen = gradients([whole, empty], 2, model=dense)
    assert far(seen.gradients[0], gradients([whole], 1, model=dense).gradients[0]) < 1e-6


class Biases(L.Callback):
    """Balancing bias and weights after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        decoder = pl_module.decoder
        self.seen.append((decoder.layers[1].ffn.gating.bias.clone(), decoder.embedding.weight.detach().clone()))


def test_step_that_the_gradient_scaler_skips_moves_no_balancing_bias(gradients: Callable[..., Seen]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**31, backoff_factor=2.0**-20)
    biases, guard, batches = Biases(), Guard(), [windows()] * 3
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    gradients(batches, 1, [biases, guard], plugins=[plugin], model={"moe": True, "gating": GATING})
    (first, _), (second, _), _ = biases.seen
    assert scaler.get_scale() == 2.0**11  # skipped once
    assert not first.any() and second.abs().max() == 0.125
    assert guard.skipped == 0  # finding a scale is no bad batch


class OneOfTwo(DataRanks):
    """A rank of two, of which the other has read ``other``."""

    def __init__(self, other: int) -> None:
        super().__init__(number=2)
        self.other = other

    def sum(self, value: Tensor) -> Tensor:
        return value + self.other


def test_ranks_with_unequal_counts_have_the_mean_over_both() -> None:
    parts = []
    for own, other, total in ((3, 9, 6.0), (9, 3, 30.0)):
        step = StepMean()
        step.begin([{"tokens": torch.tensor(own)}], 1, OneOfTwo(other), torch.device("cpu"))
        parts.append(step.mean(torch.tensor(total), "tokens"))
    assert sum(parts) / 2 == (6 + 30) / (3 + 9)


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


@pytest.mark.slow
def test_a_training_logs_each_source_and_what_was_read_of_it(tiny: Callable[..., dict[str, Any]], tmp_path: Path):
    formats.npy(tmp_path / "a.npy", documents(60, 1))
    formats.npy(tmp_path / "b.npy", documents(60, 2, b"0123456789"))
    sources = {name: {"files": str(tmp_path / f"{name}.npy"), "val_tokens": 200} for name in "ab"}
    data = built.data("mixture", tokenizer=Bytes(257), sources=sources, sequence_length=12, batch_size=2)
    task = CausalLM(Setup(tiny(False, vocab_size=257), AdamW(lr=0.01), Constant(1), 0))
    trainer = quiet_trainer(max_steps=4, max_epochs=-1, log_every_n_steps=1, val_check_interval=4)
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
