"""Frozen parts stay as they are and cost no optimizer state; multipliers reach exactly what they name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from many_ranks import BIASED, read_model, spawn, train

from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.matrices import Muon
from blockwright.training.patterns import matches, matching
from blockwright.training.starts import freeze

pytestmark = pytest.mark.xdist_group("frozen")  # its fixture trains on two ranks, once

STEPS = 2
FROZEN = ["attention", "gating"]
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp", "devices": 2},
    "fsdp": {"strategy": {}, "devices": 2},
}


def size(tensor: Any) -> int:
    """Elements that this rank holds."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def states(trainer: Any, task: Any) -> dict[str, Any]:
    """Elements of optimizer state on this rank, gradients of frozen parameters, and biases of the gates."""
    optimizer = trainer.optimizers[0]
    kept = sum(size(v) for state in optimizer.state.values() for v in state.values() if v.dim())
    held = sum(size(p) for group in optimizer.param_groups for p in group["params"])
    frozen = [p for p in task.decoder.parameters() if not p.requires_grad]
    return {"kept": kept, "held": held, "graded": sum(p.grad is not None for p in frozen), "frozen": len(frozen)}


def run(task: dict[str, Any], **how: Any) -> dict[str, Any]:
    return train(BIASED, steps=STEPS, task=task, then=states, **how)


def both(how: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return run({}, **how), run({"frozen": FROZEN}, **how)


@pytest.fixture(scope="module")
def runs() -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Strategy → for each rank, the run that trains everything and the one with frozen parts."""
    ranks = spawn(2, lambda: {name: both(how) for name, how in STRATEGIES.items()})
    return {"one process": [both({})], **{name: [rank[name] for rank in ranks] for name in STRATEGIES}}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one process", *STRATEGIES])
def test_frozen_parts_stay_to_the_bit_and_cost_no_optimizer_state_and_others_move(runs: Any, strategy: str) -> None:
    weights = runs[strategy][0][1]["weights"]
    before = compose(read_model(BIASED)).state_dict()
    still = {name for name in weights if torch.equal(weights[name], before[name])}
    assert {name for name in before if any(matches(name, pattern) for pattern in FROZEN)} == still
    assert any(name.endswith("gating.bias") for name in still)
    for trained, frozen in runs[strategy]:
        all_of_it, rest = trained["extra"], frozen["extra"]
        assert rest["graded"] == 0 < rest["frozen"] and all_of_it["frozen"] == 0
        assert all_of_it["kept"] - rest["kept"] == 2 * (all_of_it["held"] - rest["held"]) > 0  # two moments each


def test_pattern_matches_whole_parts_of_a_name() -> None:
    name = "layers.0.attention.query.weight"
    assert all(matches(name, p) for p in ("attention", "layers.0", "*.weight", "layers.*.query", "weight", name))
    assert not any(matches(name, p) for p in ("attn", "atten", "layers.1", "layer", "query.bias"))


@pytest.mark.parametrize("recipe", [AdamW, Muon])
def test_pattern_that_matches_nothing_and_multiplier_that_is_no_positive_number_are_refused(recipe: Any) -> None:
    decoder = compose(read_model(BIASED), device="meta")
    with pytest.raises(ConfigError) as refused:
        recipe(multipliers={"atention": 0.1}).build(decoder)
    assert refused.value.path.startswith("optimizer.multipliers")
    with pytest.raises(ConfigError) as refused:
        freeze(decoder, ["atention"])
    assert refused.value.path.startswith("task.frozen")
    for factor in (0, -1, float("nan"), float("inf"), "slow", True):
        with pytest.raises(ConfigError) as refused:
            recipe(multipliers={"attention": factor})
        assert refused.value.path == "optimizer.multipliers.attention"


def test_pattern_that_matches_nothing_is_refused_before_training(checked: Any) -> None:
    with pytest.raises(ConfigError):
        checked("optimizer.multipliers={atention:0.1}")


@pytest.mark.parametrize("recipe", [AdamW, Muon])
def test_multiplier_scales_the_learning_rate_of_what_it_names_alone(recipe: Any) -> None:
    decoder = compose(read_model(BIASED))
    optimizer = recipe(lr=0.01, multipliers={"attention": 0.1, "layers.2": 3}).build(decoder)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, _ in decoder.named_parameters()]
    assert len(rates) == len(names)
    attention, last = (set(matching(names, [p], "x")) for p in ("attention", "layers.2"))
    for name, parameter in decoder.named_parameters():
        factor = 3 if name in last else 0.1 if name in attention else 1
        assert rates[id(parameter)] == pytest.approx(0.01 * factor), name
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)
    plain = [[group["name"] for group in recipe(**m).build(decoder).param_groups] for m in ({}, {"multipliers": {}})]
    assert plain[0] == plain[1]


@pytest.mark.slow
def test_multiplied_parts_move_less_through_a_schedule() -> None:
    plain, slow = (
        train(BIASED, steps=3, optimizer=AdamW(lr=3e-3, weight_decay=0.0, multipliers=m), gradient_clip_val=None)
        for m in (None, {"attention": 1e-3})
    )
    before = compose(read_model(BIASED)).state_dict()
    moved = [
        sum(float((run["weights"][n] - before[n]).norm()) for n in before if matches(n, "attention"))
        for run in (plain, slow)
    ]
    assert 0 < moved[1] < 2e-3 * moved[0]
