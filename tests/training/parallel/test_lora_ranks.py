"""Adapters and loops under every strategy: the losses and weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import DEEPSEEK, DENSE, MOE, Descent, far, read_model, spawn, train

from blockwright.blocks.checkpoint.read import read_checkpoint
from blockwright.blocks.compose import compose
from blockwright.blocks.linear import is_adapter
from blockwright.training.starts import Lora

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lora_ranks")]  # its fixture trains on two ranks, once

STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": {}, "fsdp_ep": {"expert": 2}, "tp": {"tensor": 2, "shard": 1}}


def run(folder: Path, name: str, **how: Any) -> dict[str, Any]:
    adapter = Lora(["attention", "ffn", "head"], rank=3)
    saved = str(folder / f"{name}.ckpt")
    return train(DEEPSEEK, steps=2, optimizer=Descent(), task={"starts": [adapter]}, save=saved, **how)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")

    def all_() -> dict[str, Any]:
        return {name: run(folder, name, strategy=how, devices=2) for name, how in STRATEGIES.items()}

    return folder, {**spawn(2, all_)[0], "alone": run(folder, "alone")}


@pytest.mark.parametrize("strategy", ["alone", *STRATEGIES])
def test_adapters_are_those_of_one_process_and_alone_move_and_are_optimized(runs: Any, strategy: str) -> None:
    losses, apart = far(runs[1][strategy], runs[1]["alone"])
    assert losses < 1e-5 and apart < 1e-4
    weights, before = runs[1][strategy]["weights"], compose(read_model(DEEPSEEK)).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    adapters = {name for name in weights if is_adapter(name)}
    assert len(adapters) == len(weights) - len(before) > 0 and all(weights[name].any() for name in adapters)
    checkpoint = read_checkpoint(runs[0] / f"{strategy}.ckpt")
    assert set(checkpoint["optimizer_parameters"][0]) == adapters


HUGINN = DENSE.replace("n_layers: 2", "n_layers: 3") + (
    "loop: {name: cycle, first: 1, last: 1, entry: adapter, visits: 3, gradient_visits: 2,"
    " visit_draw: {name: uniform, least: 1, most: 4}}\n"
)
OURO = DENSE + "loop: {name: cycle, visits: 3, entry: normed, exit: {name: gate, entropy: 0.1}}\n"
EXPERTS = MOE + "loop: {name: repeat, visits: 2, entry: add}\nmtp: {depth: 1, loss_weight: 0.3}\n"
LOOPS = {"huginn": HUGINN, "ouro": OURO, "experts": EXPERTS}
OVER: dict[str, Any] = {"ddp": "ddp", "shard": {"shard": 2}, "tensor": {"tensor": 2}, "expert": {"expert": 2}}
CASES = [
    *(("huginn", how, task) for how, task in (("ddp", "none"), ("shard", "full"), ("tensor", "none"))),
    ("ouro", "shard", "none"),
    ("ouro", "tensor", "selective"),
    ("experts", "shard", "none"),
    ("experts", "expert", "full"),
]
EXACT = 1e-7  # in double precision, whose gradients are clipped by a norm


def trained(model: str, strategy: Any = "auto", devices: int = 1, recompute: str = "none") -> dict[str, Any]:
    settings: dict[str, Any] = {"optimizer": Descent(), "steps": 2, "double": True}
    task = {"activation_checkpointing": recompute}
    return train(LOOPS[model], strategy=strategy, devices=devices, task=task, **settings)


def over_ranks() -> list[dict[str, Any]]:
    return [trained(model, OVER[how], 2, recompute) for model, how, recompute in CASES]


def test_ranks_train_a_loop_as_one_process_does() -> None:
    whole = {model: trained(model) for model in LOOPS}
    for case, found in zip(CASES, spawn(2, over_ranks)[0], strict=True):
        losses, weights = far(found, whole[case[0]])
        assert losses < EXACT and weights < EXACT, (case, losses, weights)
