"""The gradient of a step is that of one large batch, whatever it is divided into and however its tokens are spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from blockwright.training.callbacks.guard import Guard
from blockwright.training.lookahead import Lookahead
from blockwright.training.optimizers.base import OptimizerRecipe
from blockwright.training.parallel.ranks import DataRanks
from blockwright.training.schedulers.constant import Constant
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.setup import Setup
from blockwright.training.tasks.step_mean import StepMean

Batch = dict[str, Tensor]
ROWS, LENGTH = 16, 12
GATING = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.125, "balance": [{"name": "expert", "alpha": 0.05}]}
ROUTED = {"moe": True, "mtp": {"depth": 2, "loss_weight": 0.5}}


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
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        ours = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
        trainer = L.Trainer(**{**quiet, **ours, **settings}, default_root_dir=tmp_path, callbacks=[seen, *callbacks])
        loader = batches if isinstance(batches, DataLoader) else DataLoader(batches, batch_size=None)
        trainer.fit(CausalLM(Setup(tiny(**model), Descent(), Constant(1)), z_loss=1e-2), loader)
        return seen

    return train


def far(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in pairs)


@pytest.mark.parametrize(("sizes", "packed"), [((4, 4, 4, 4), False), ((1, 9, 6), True)])
def test_micro_batches_have_the_gradient_of_one_batch(
    gradients: Callable[..., Seen], sizes: tuple[int, ...], packed: bool
) -> None:
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


def test_items_are_looked_at_and_not_taken() -> None:
    items = Lookahead(iter(range(5)))
    assert next(items) == 0 and items.ahead(2) == [1, 2] and items.ahead(1) == [1]
    assert [next(items), next(items)] == [1, 2] and items.ahead(9) == [3, 4]
    assert list(items) == [3, 4] and items.ahead(1) == []


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
    """A strategy averages over ranks: (a + b) / 2 is the sum of both over the count of both, and no mean of means."""
    parts = []
    for own, other, total in ((3, 9, 6.0), (9, 3, 30.0)):
        step = StepMean()
        step.begin([{"tokens": torch.tensor(own)}], 1, OneOfTwo(other), torch.device("cpu"))
        parts.append(step.mean(torch.tensor(total), "tokens"))
    assert sum(parts) / 2 == (6 + 30) / (3 + 9)
