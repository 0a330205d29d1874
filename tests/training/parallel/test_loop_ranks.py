"""Loops over ranks: a layer is sharded once and visited often, and all ranks make the same visits."""

from __future__ import annotations

from typing import Any

import pytest
from many_ranks import DENSE, MOE, Descent, far, spawn, train

pytestmark = pytest.mark.xdist_group("loop_ranks")

HUGINN = DENSE.replace("n_layers: 2", "n_layers: 3") + (
    "loop: {name: cycle, first: 1, last: 1, entry: adapter, visits: 3, gradient_visits: 2,"
    " visit_draw: {name: uniform, least: 1, most: 4}}\n"
)
OURO = DENSE + "loop: {name: cycle, visits: 3, entry: normed, exit: {name: gate, entropy: 0.1}}\n"
EXPERTS = MOE + "loop: {name: repeat, visits: 2, entry: add}\nmtp: {depth: 1, loss_weight: 0.3}\n"
MODELS = {"huginn": HUGINN, "ouro": OURO, "experts": EXPERTS}
STRATEGIES: dict[str, Any] = {"ddp": "ddp", "shard": {"shard": 2}, "tensor": {"tensor": 2}, "expert": {"expert": 2}}
CASES = [
    *(("huginn", how, task) for how, task in (("ddp", "none"), ("shard", "full"), ("tensor", "none"))),
    ("ouro", "shard", "none"),
    ("ouro", "tensor", "selective"),
    ("experts", "shard", "none"),
    ("experts", "expert", "full"),
]
EXACT = 1e-7  # in double precision, whose gradients are clipped by a norm


def trained(model: str, strategy: Any = "auto", devices: int = 1, recompute: str = "none") -> dict[str, Any]:
    settings: dict[str, Any] = {"optimizer": Descent(), "steps": 4, "double": True}
    task = {"activation_checkpointing": recompute}
    return train(MODELS[model], strategy=strategy, devices=devices, task=task, **settings)


def over_ranks() -> list[dict[str, Any]]:
    return [trained(model, STRATEGIES[how], 2, recompute) for model, how, recompute in CASES]


@pytest.mark.slow
def test_ranks_train_a_loop_as_one_process_does() -> None:
    whole = {model: trained(model) for model in MODELS}
    for case, found in zip(CASES, spawn(2, over_ranks)[0], strict=True):
        losses, weights = far(found, whole[case[0]])
        assert losses < EXACT and weights < EXACT, (case, losses, weights)
