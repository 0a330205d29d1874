"""Adapters under every strategy: the losses and adapters of one process, and a base that stays bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import DEEPSEEK, Descent, far, read_model, spawn, train

from blockwright.blocks.checkpoint.read import read_checkpoint
from blockwright.blocks.compose import compose
from blockwright.blocks.lora import is_adapter
from blockwright.training.starts.adapter import Lora

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lora_ranks")]  # its fixture trains on two ranks, once

STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": {}, "fsdp_ep": {"expert": 2}, "tp": {"tensor": 2, "shard": 1}}


def run(folder: Path, name: str, **how: Any) -> dict[str, Any]:
    adapter = Lora(["attention", "ffn", "head"], rank=3)
    saved = str(folder / f"{name}.ckpt")
    return train(DEEPSEEK, steps=3, optimizer=Descent(), task={"starts": [adapter]}, save=saved, **how)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")

    def all_() -> dict[str, Any]:
        return {name: run(folder, name, strategy=how, devices=2) for name, how in STRATEGIES.items()}

    return folder, {**spawn(2, all_)[0], "alone": run(folder, "alone")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_and_adapters_are_those_of_one_process(runs: Any, strategy: str) -> None:
    losses, weights = far(runs[1][strategy], runs[1]["alone"])
    assert losses < 1e-5 and weights < 1e-4


@pytest.mark.parametrize("strategy", ["alone", *STRATEGIES])
def test_base_stays_bit_identical_and_every_adapter_moves(runs: Any, strategy: str) -> None:
    weights = runs[1][strategy]["weights"]
    before = compose(read_model(DEEPSEEK)).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    adapters = {name for name in weights if is_adapter(name)}
    assert len(adapters) == len(weights) - len(before) > 0
    assert all(weights[name].any() for name in adapters)


@pytest.mark.parametrize("strategy", ["alone", *STRATEGIES])
def test_optimizer_has_adapters_alone(runs: Any, strategy: str) -> None:
    checkpoint = read_checkpoint(runs[0] / f"{strategy}.ckpt")
    adapters = {name.removeprefix("decoder.") for name in checkpoint["state_dict"] if is_adapter(name)}
    assert set(checkpoint["optimizer_parameters"][0]) == adapters
