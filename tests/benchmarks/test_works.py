"""What is timed against each other computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import works
from benchmarks.stopwatch import turns

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
