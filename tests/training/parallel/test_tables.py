"""Memories over ranks: their tables are spread by rows, and training is that of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import DENSE, far, spawn, train
from torch import nn

from blockwright.blocks.compose import compose
from blockwright.blocks.memory import Table
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parallel.arithmetic import held_bytes
from blockwright.training.parallel.dry_run import Meter
from blockwright.training.parallel.local import own_place, plain
from blockwright.training.parallel.sizes import sizes_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tables")]

CLOSE = 1e-5  # relative, fp32
MEMORY = (
    DENSE.replace("n_layers: 2", "n_layers: 3")
    + """
memory: {name: engram, rows: 41, n_heads: 2, width: 24, ngram: 2, taps: 2, end: 7}
layout: {memory: memory none per_layer}
variants: {memory: {none: null, per_layer: {name: per_layer_embedding, width: 6}}}
mtp: {depth: 1, loss_weight: 0.3}
"""
)


class Steps(torch.optim.Optimizer):
    """Plain gradient descent, of tables too."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.grad.is_sparse:
                rows = p.grad.coalesce()
                plain(p)[rows.indices()[0] - own_place(p)[1][0]] -= self.defaults["lr"] * rows.values()
            else:
                p -= self.defaults["lr"] * p.grad
        return loss


class Descent(OptimizerRecipe):
    """A gradient that is a factor off shows at once, as Adam hides it."""

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        return Steps([p for p in module.parameters() if p.requires_grad], {"lr": 0.3})


STRATEGIES: dict[str, tuple[int, Any]] = {
    "ddp": (2, "ddp"), "fsdp": (2, {}), "tp": (2, {"tensor": 2}), "context": (2, {"context": 2}),
    "copies": (4, {"replicate": 2}), "all": (4, {"tensor": 2, "context": 2}),
}  # fmt: skip
STREAMS = MEMORY.replace("residual: prenorm", "residual: mhc")  # whose scales begin with gradients of noise
# Memory, convolutions and a loop, whose second visit recalls and convolves again.
TOGETHER = MEMORY.replace("n_kv_heads: 2}", "n_kv_heads: 2, key_conv: canon, value_conv: {name: canon, taps: 3}}") + (
    "loop: {name: cycle, first: 1, visits: 2, entry: normed}\n"
)
TOGETHER = TOGETHER.replace(
    "residual: prenorm", "residual: {name: convolved, attention_conv: canon, ffn_out_conv: canon}"
)
CASES: dict[str, dict[str, Any]] = {
    "descent": {"model": STREAMS, "optimizer": Descent(), "steps": 2},
    "packed, recomputed": {
        "model": STREAMS,
        "optimizer": Descent(),
        "steps": 2,
        "packed": True,
        "accumulate_grad_batches": 2,
        "task": {"activation_checkpointing": "full"},
    },
    "adam": {"model": MEMORY, "optimizer": AdamW(lr=3e-3), "steps": 2},
    "together": {"model": TOGETHER, "optimizer": Descent(), "steps": 2, "packed": True},
}
TWO = [("ddp", "descent"), ("fsdp", "packed, recomputed"), ("tp", "descent"), ("context", "packed, recomputed")]
FOUR = [("copies", "adam"), ("all", "together")]
HALF = {"optimizer": AdamW(lr=1e-3), "steps": 1}
REST = {"optimizer": AdamW(lr=1e-3), "steps": 2}


def rows_held(trainer: Any, task: Any) -> list[tuple[int, bool]]:
    """Rows of each table that this rank has, and whether its gradient was sparse."""
    tables = [m.weight for m in task.decoder.modules() if isinstance(m, Table)]
    return [(len(plain(w)), w.grad is None or w.grad.is_sparse) for w in tables]


def run(case: str, strategy: Any = "auto", devices: int = 1, **more: Any) -> dict[str, Any]:
    return train(strategy=strategy, devices=devices, then=rows_held, **{**CASES[case], **more})


@functools.cache
def alone(case: str) -> dict[str, Any]:
    return run(case)


def work(todo: list[tuple[str, str]], folder: Path | None = None) -> dict[Any, Any]:
    done: dict[Any, Any] = {(name, case): run(case, STRATEGIES[name][1], STRATEGIES[name][0]) for name, case in todo}
    if folder is not None:
        meter = Meter()
        saved = {"strategy": {"sharded_checkpoints": True}, "devices": 2, "save": str(folder / "rows"), **HALF}
        train(MEMORY, callbacks=[meter], **saved)
        done["resumed"] = train(MEMORY, strategy={"tensor": 2}, devices=2, ckpt_path=str(folder / "rows"), **REST)
        done["bytes"] = meter.bytes
    return done


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return spawn(2, work, TWO, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(("strategy", "case"), TWO, ids=lambda v: v)
def test_two_ranks_train_what_one_does(strategy: str, case: str, two: list[Any]) -> None:
    losses, weights = far(two[0][strategy, case], alone(case))
    assert losses < CLOSE and weights < CLOSE


def test_four_ranks_train_what_one_does() -> None:
    for (strategy, case), found in spawn(4, work, FOUR)[0].items():
        losses, weights = far(found, alone(case))
        assert losses < CLOSE and weights < CLOSE, (strategy, case)


def test_no_rank_holds_a_whole_table_and_gradients_stay_sparse(two: list[Any]) -> None:
    whole = [rows for rows, _ in alone("descent")["extra"]]
    for name in ("fsdp", "context"):
        case = next(case for strategy, case in TWO if strategy == name)
        held = [rank[name, case]["extra"] for rank in two]
        assert [a[0] + b[0] for a, b in zip(*held, strict=True)] == whole
        assert all(0 < rows < n and sparse for rank in held for (rows, sparse), n in zip(rank, whole, strict=True))


def test_a_folder_of_rows_is_resumed_under_another_strategy(two: list[Any]) -> None:
    whole = train(MEMORY, **REST)
    losses, weights = far(two[0]["resumed"], {**whole, "losses": whole["losses"][1:]})
    assert losses < CLOSE and weights < CLOSE


def test_each_rank_holds_what_the_plan_says(two: list[Any]) -> None:
    plan = held_bytes(compose(MEMORY, device="meta"), sizes_of({}, 2), AdamW())
    for rank in two:
        assert rank["bytes"]["parameters"] == pytest.approx(plan["parameters"], rel=0.02)
        assert rank["bytes"]["optimizer"] == pytest.approx(plan["optimizer"], rel=0.02)
