"""What is timed against each other computes the same, and has the sizes that it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import passes, works
from benchmarks.models.base import build
from benchmarks.models.blockwright import cache_formula
from benchmarks.race import contenders
from benchmarks.shapes import FAMILIES, SHAPES, TOLERANCE, Family, composition
from benchmarks.stopwatch import turns
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import count_parameters

Caught = dict[str, list[Tensor]]


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Caught]:
    """Name of a work → its output and the gradients of its inputs, at one gradient of the output."""

    def keep(outputs: Callable[[], Tensor], *inputs: Tensor) -> Any:
        def work() -> list[Tensor]:
            y = outputs()
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
            found = [y.detach(), *(x.grad for x in inputs if x.grad is not None)]
            for x in inputs:
                x.grad = None
            return found

        return work

    monkeypatch.setattr(works, "training", keep)

    def run(make: Callable[..., Any], *arguments: Any) -> Caught:
        made, flops = make(*arguments)
        assert flops > 0
        return {name: work() for name, work in made.items()}

    return run


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_every_way_to_run_experts_gives_the_same(
    outcomes: Callable[..., Caught], dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(works, "D_MODEL", 24)
    monkeypatch.setattr(works, "WIDTH", 16)
    found = outcomes(works.grouped_experts, (5, 2, 37), dtype, "cpu")
    assert list(found) == list(works.EXPERTS)
    del found["one dense product"]
    _agree(found, tolerance, parts=5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_every_way_to_attend_gives_the_same(outcomes: Callable[..., Caught], dtype: str, tolerance: float) -> None:
    _agree(outcomes(works.attention, (2, 19, 3, 12, 8), dtype, "cpu"), tolerance, parts=4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_both_ways_to_the_loss_give_the_same(outcomes: Callable[..., Caught], dtype: str, tolerance: float) -> None:
    _agree(outcomes(works.loss, 21, 50, dtype, "cpu"), tolerance, parts=3)


def _agree(found: Caught, tolerance: float, parts: int) -> None:
    ours = found["ours"]
    assert len(ours) == parts
    for name, theirs in found.items():
        for a, b in zip(ours, theirs, strict=True):
            assert b.abs().max() > 0
            off = (a.float() - b.float()).norm() / b.float().norm()
            assert off <= tolerance, f"{name}: {off}"


def test_works_are_timed_in_turns_and_the_first_call_does_not_count() -> None:
    calls: list[str] = []
    made = {name: (lambda name=name: calls.append(name)) for name in "abc"}  # type: ignore[misc]
    assert turns(made, "cpu", budget=0.01, shift=1).keys() == {"a", "b", "c"}
    assert [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name] == ["b", "c", "a"]
    calls.clear()
    turns(made, "cpu", budget=0.0, shift=0)
    assert calls == ["a", "b", "c"]


def test_small_has_seventy_two_million_parameters_of_which_thirty_are_active() -> None:
    found = count_parameters(compose(composition(SHAPES["small"], "mla_moe"), device="meta"))
    assert round(found.total / 1e6, 1) == 72.0
    assert round((found.active - found.embedding) / 1e6, 1) == 30.1


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "smoke"])
def test_families_of_a_shape_have_one_active_size(shape: str) -> None:
    active = []
    for family in FAMILIES:
        found = count_parameters(compose(composition(SHAPES[shape], family), device="meta"))
        active.append(found.active - found.embedding)
    assert max(active) / min(active) - 1 <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_holds_what_the_formula_says(family: Family, dtype: torch.dtype) -> None:
    shape = SHAPES["smoke"]
    decoder = compose(composition(shape, family)).to(dtype)
    held = sum(cache.nbytes for cache in decoder.new_caches(3, 17))
    assert held == cache_formula(shape, family, 3, 17, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_the_parameters_of_ours(family: Family) -> None:
    found = [c for c in contenders(family, older=True) if c.maker in ("ours", "transformers") and c.tuned]
    models = [build(c, SHAPES["smoke"], "fp32", "cpu") for c in found]
    assert len({sum(p.numel() for p in model.module.parameters()) for model in models}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_other_peers_have_the_parameters_of_ours(family: Family) -> None:
    pytest.importorskip("litgpt")
    pytest.importorskip("x_transformers")
    sizes = {}
    for contender in contenders(family):
        model = build(contender, SHAPES["tiny"], "fp32", "cpu")
        sizes[contender.label] = sum(p.numel() for p in model.module.parameters())
    assert max(sizes.values()) / min(sizes.values()) - 1 <= TOLERANCE, sizes


def test_every_family_races_ours_and_transformers_at_both_settings() -> None:
    for family in FAMILIES:
        labels = [c.label for c in contenders(family)]
        assert len(set(labels)) == len(labels)
        for library in ("ours", "transformers", "litgpt"):
            assert sum(label.startswith(f"{library} ") for label in labels) == 2


@pytest.mark.parametrize("attention", passes.ATTENTIONS)
@torch.inference_mode()
def test_a_pass_keeps_one_token(attention: str) -> None:
    around = {**passes.AROUND, "d_model": 32, "n_layers": 2, "ffn": {"name": "swiglu", "d_ff": 16}}
    decoder = compose({**around, "attention": passes.ATTENTIONS[attention]}, seed=0).eval()
    caches = decoder.new_caches(1, 16)
    for n in passes.TOKENS:
        assert passes.timed(decoder, caches, n) > 0
    assert [cache.length for cache in caches] == [len(passes.TOKENS)] * 2


def test_ratios_are_of_one_round() -> None:
    rounds = [{1: 0.01, 2: 0.011, 3: 0.02}, {1: 0.03, 2: 0.033, 3: 0.06}, {1: 0.02, 2: 0.022, 3: 0.04}]
    cells = passes.row("gqa", rounds).split(" | ")
    assert cells[1:4] == ["20.0", "22.0", "40.0"]
    assert cells[4:] == ["1.10 (1.10 to 1.10)", "2.00 (2.00 to 2.00) |"]
