"""Whatever the precision and the strategy: figures are exact sums, and routing state moves by exact steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import many_ranks
import pytest
import torch
from many_ranks import BIASED, DEEPSEEK, LENGTH, MTP, Descent, Tokens, Windows, read_model, spawn
from torch import Tensor
from torch.utils.data import DataLoader

from blockwright.training.metrics import ExpertLoad, TokenLoss
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parallel.local import whole
from blockwright.training.parallel.strategy import Parallel
from blockwright.training.schedulers import Constant
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.making import Setup
from blockwright.training.tasks.routing import gates_of
from tests.training.parallel.quiet import quiet_trainer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("precision_matrix")]  # its fixture trains on two ranks, once

GATES = {"softmax": DEEPSEEK, "sigmoid_bias": BIASED.replace("bias_step: 0.05", "bias_step: 0.001")}
STRATEGIES = {"ddp": lambda: "ddp", "fsdp": Parallel}
STEPS, ROWS, VALIDATED = 2, 4, 12
# Each precision once; both gates in single precision, with which others are compared.
CELLS = [("32-true", "sigmoid_bias"), ("32-true", "softmax"), ("bf16-mixed", "softmax"), ("bf16-true", "sigmoid_bias")]


def rows(first: int, number: int) -> dict[str, Tensor]:
    """Windows whose numbers of scored tokens differ."""
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(many_ranks.VOCABULARY, (64, LENGTH + 1), generator=draw)[first : first + number]
    scored = torch.randint(3, LENGTH + 1, (64,), generator=draw)[first : first + number]
    place = torch.arange(LENGTH).expand(number, -1)
    targets = tokens[:, 1:].masked_fill(place >= scored[:, None], many_ranks.IGNORED)
    return {"tokens": tokens[:, :-1], "targets": targets, "positions": place, "n_bytes": scored}


class Rows(L.LightningDataModule):
    """Global batches of so many rows, of which each rank has its slice.

    Args:
        train: rows of each training batch
        val: of each validation batch
    """

    def __init__(self, train: list[int], val: list[int] | None = None) -> None:
        super().__init__()
        self.train, self.val = train, val or []

    def _loader(self, sizes: list[int]) -> Any:
        sharing = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}  # type: ignore[union-attr]
        shares = [size // sharing["num_replicas"] for size in sizes]
        first = [sum(sizes[:i]) + sharing["rank"] * share for i, share in enumerate(shares)]
        return DataLoader([rows(*place) for place in zip(first, shares, strict=True)], batch_size=None)

    def train_dataloader(self) -> Any:
        return self._loader(self.train)

    def val_dataloader(self) -> Any:
        return self._loader(self.val)


class Given(L.Callback):
    """What this rank's metrics and gates were given, and what became of it; a bias starts where bf16 steps of 0.004."""

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self.nll: list[tuple[float, float]] = []
        self.loads: list[Tensor] = []
        self.moved: list[Tensor] = []
        self.gates = [gate for gate in gates_of(task.model).values() if hasattr(gate, "bias")]
        for gate in self.gates:
            gate.bias.fill_(0.5)
        self.expected = [gate.bias.clone() for gate in self.gates]
        for gate, bias in zip(self.gates, self.expected, strict=True):
            self._watch(gate, bias)
        update = task._loss("val").update
        task._loss("val").update = lambda nll, n, b: (self.nll.append((float(nll), float(n))), update(nll, n, b))

    def _watch(self, gate: Any, expected: Tensor) -> None:
        update = gate.update

        def watched(load: Tensor) -> None:
            self.loads.append(load.clone())
            expected.add_(gate.bias_step * (load.double().mean() - load.double()).sign().float())
            update(load)

        gate.update = watched


def trainer_of(strategy: str, devices: int, **settings: Any) -> L.Trainer:
    return quiet_trainer(devices=devices, strategy=STRATEGIES.get(strategy, lambda: "auto")(), **settings)


def cell(precision: str, gate: str, strategy: str = "auto", devices: int = 1) -> dict[str, Any]:
    """One cell of the matrix: two steps that leave the weights as they are, and a validation."""
    given, task = Given(), CausalLM(Setup(read_model(GATES[gate]), AdamW(lr=1e-12, weight_decay=0), Constant()))
    trainer = trainer_of(
        strategy,
        devices,
        precision=precision,
        max_steps=STEPS,
        log_every_n_steps=STEPS,
        num_sanity_val_steps=0,
        callbacks=[given],
    )
    trainer.fit(task, Rows([ROWS] * STEPS, [2] * VALIDATED))
    sums = [m for m in task.modules() if isinstance(m, TokenLoss | ExpertLoad)]
    return {
        "figures": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "nll": given.nll,
        "loads": given.loads,
        "biases": [gate.bias.clone() for gate in given.gates],
        "expected": given.expected,
        "dtypes": {getattr(m, name).dtype for m in sums for name in m._defaults},
    }


# Gradients of one step, divided in all ways.


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, task: L.LightningModule, optimizer: Any) -> None:
        self.seen = {name: whole(p.grad).clone() for name, p in task.named_parameters() if p.grad is not None}


def gradients(sizes: list[int], strategy: str = "auto", devices: int = 1) -> dict[str, Tensor]:
    seen, task = Gradients(), CausalLM(Setup(read_model(MTP), Descent(), Constant()), z_loss=1e-2)
    trainer = trainer_of(strategy, devices, max_steps=1, accumulate_grad_batches=len(sizes), callbacks=[seen])
    trainer.fit(task, Rows(sizes))
    return seen.seen


# Stopped between two logged steps and resumed.


class Losses(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.last = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train")}


def logged(folder: Path, strategy: str, devices: int) -> list[dict[str, float]]:
    """What a run logs at its fourth step: undisturbed, and resumed after its second."""
    found = []
    for stop, path in ((4, None), (2, None), (4, folder / f"{strategy}.ckpt")):
        losses, task = Losses(), CausalLM(Setup(read_model(BIASED), AdamW(lr=1e-3), Constant()))
        trainer = trainer_of(strategy, devices, max_steps=stop, log_every_n_steps=4, callbacks=[losses])
        trainer.fit(task, Windows(Tokens()), ckpt_path=path, weights_only=True)
        if stop == 2:
            trainer.save_checkpoint(folder / f"{strategy}.ckpt")
        found.append(losses.last)
    return [found[0], found[2]]


def two_ranks(folder: Path) -> dict[Any, Any]:
    done: dict[Any, Any] = {(*c, s): cell(*c, s, 2) for c in CELLS for s in STRATEGIES}
    done |= {("gradients", s): gradients([8, 8], s, 2) for s in STRATEGIES}
    return done | {("logged", s): logged(folder, s, 2) for s in STRATEGIES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return spawn(2, two_ranks, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    return {c: cell(*c) for c in CELLS}


@pytest.mark.parametrize("strategy", ["one process", *STRATEGIES])
@pytest.mark.parametrize(("precision", "gate"), CELLS, ids=str)
def test_figures_are_exact_and_biases_move_by_their_step(precision, gate, strategy, ranks, alone):
    one = strategy == "one process"
    cells = [alone[precision, gate]] if one else [rank[precision, gate, strategy] for rank in ranks]
    nats, tokens = (sum(pair[i] for each in cells for pair in each["nll"]) for i in (0, 1))
    for each in cells:
        assert each["dtypes"] == {torch.float64}
        assert each["figures"]["val/loss"] == pytest.approx(nats / tokens, rel=1e-6)
        reference = alone["32-true", gate]["figures"]
        assert each["figures"]["val/loss"] == pytest.approx(
            reference["val/loss"], rel=1e-5 if precision == "32-true" else 2e-3
        )
        assert each["figures"]["train/loss"] == pytest.approx(reference["train/loss"], rel=5e-3)
        assert all(
            torch.equal(a, b) and a.dtype == torch.float32
            for a, b in zip(each["biases"], each["expected"], strict=True)
        )
        assert all((bias - 0.5).abs().max() > 0 for bias in each["biases"])
        for load in each["loads"]:  # whole numbers: three experts for each of the step's tokens
            assert load.dtype == torch.float32 and load.sum() == 3 * ROWS * LENGTH and torch.equal(load, load.round())
    assert len(cells[0]["biases"]) == (2 if gate == "sigmoid_bias" else 0)


@pytest.mark.parametrize("division", ["2 x 8", "4 x 4", "ddp: 2 x 2 x 4", "fsdp: 2 x 2 x 4"])
def test_gradient_is_that_of_one_batch_of_sixteen(division: str, ranks: list[Any]) -> None:
    one = gradients([16])
    name = division.partition(":")[0]
    found = (
        ranks[0]["gradients", name] if name in STRATEGIES else gradients([8] * 2 if division == "2 x 8" else [4] * 4)
    )
    assert found.keys() == one.keys()
    assert max(float((found[n] - g).norm() / g.norm().clamp(min=1e-2)) for n, g in one.items()) < 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_run_logs_the_training_loss_of_all_ranks(strategy: str, ranks: list[Any]) -> None:
    undisturbed, resumed = ranks[0]["logged", strategy]
    assert undisturbed["train/loss"] == resumed["train/loss"]
    assert {k: v for k, v in resumed.items() if "load" in k} == {k: v for k, v in undisturbed.items() if "load" in k}
