"""Routing state keeps its precision however a model is built or cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from blocks.compose import compose
from blocks.gating.base import count
from blocks.gating.sigmoid_bias import SigmoidBias

GATING = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.001}


@pytest.fixture
def in_bf16() -> Iterator[None]:
    """As a trainer with ``bf16-true`` builds and runs a model."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def gate_of(decoder: Any) -> SigmoidBias:
    (gate,) = [m for m in decoder.modules() if isinstance(m, SigmoidBias)]
    return gate


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gate_built_in_bf16_has_a_bias_in_fp32(in_bf16: None, tiny: Callable[..., dict[str, Any]], device: str) -> None:
    decoder = compose(tiny(moe=True, gating=GATING), device=device)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert gate_of(decoder).bias.dtype == torch.float32
    assert SigmoidBias(8, 4).bias.dtype == torch.float32  # by itself, too


def test_bias_moves_by_its_exact_step_after_every_cast(tiny: Callable[..., dict[str, Any]]) -> None:
    decoder = compose(tiny(moe=True, gating=GATING))
    gate = gate_of(decoder)
    gate.bias.fill_(0.5)
    decoder.to(torch.bfloat16).half().bfloat16()
    gate.update(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 3.0]))
    assert torch.equal(gate.bias, torch.tensor([0.501, 0.501, 0.5, 0.499, 0.499, 0.5]))


def test_loads_are_whole_numbers_in_bf16(in_bf16: None) -> None:
    experts = torch.tensor([0] * 1351 + [1] * 2537)[:, None]
    assert count(experts, 3).tolist() == [1351, 2537, 0] and count(experts, 3).dtype == torch.float32


def test_weights_start_from_the_same_numbers_in_bf16(in_bf16: None, tiny: Callable[..., dict[str, Any]]) -> None:
    low = compose(tiny(moe=True))
    torch.set_default_dtype(torch.float32)
    for (name, a), b in zip(low.state_dict().items(), compose(tiny(moe=True)).state_dict().values(), strict=True):
        assert torch.equal(a, b.to(a.dtype)), name
