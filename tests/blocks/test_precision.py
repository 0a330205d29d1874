"""Routing state keeps its precision however a model is built or cast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from blockwright.blocks import precision
from blockwright.blocks.compose import compose
from blockwright.blocks.gating.base import count
from blockwright.blocks.gating.biased import SigmoidBias
from blockwright.blocks.gating.softmax import SoftmaxTopK
from tests.blocks.small import Make

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


def test_model_built_in_bf16_has_a_bias_in_fp32_and_starts_from_the_same_numbers(in_bf16: None, tiny: Make) -> None:
    for device in ("meta", "cpu"):
        low = compose(tiny(moe=True, gating=GATING), device=device)
        assert {p.dtype for p in low.parameters()} == {torch.bfloat16} and gate_of(low).bias.dtype == torch.float32
    assert SigmoidBias(8, 4).bias.dtype == torch.float32  # by itself, too
    experts = torch.tensor([0] * 1351 + [1] * 2537)[:, None]
    assert count(experts, 3).tolist() == [1351, 2537, 0] and count(experts, 3).dtype == torch.float32
    torch.set_default_dtype(torch.float32)
    right = compose(low.config).state_dict()
    assert all(torch.equal(a, right[name].to(a.dtype)) for name, a in low.state_dict().items())


def test_bias_moves_by_its_exact_step_after_every_cast(tiny: Make) -> None:
    decoder = compose(tiny(moe=True, gating=GATING))
    gate = gate_of(decoder)
    gate.bias.fill_(0.5)
    decoder.to(torch.bfloat16).half().bfloat16()
    gate.update(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 3.0]))
    assert torch.equal(gate.bias, torch.tensor([0.501, 0.501, 0.5, 0.499, 0.499, 0.5]))


def test_router_on_a_gpu_multiplies_by_the_product_that_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReachedError(Exception):
        pass

    def reached(a: Tensor, b: Tensor) -> Tensor:
        raise ReachedError

    monkeypatch.setattr(precision, "_full_product", reached)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), pytest.raises(ReachedError):
        SoftmaxTopK(d_model=16, n_experts=8, top_k=2)(torch.empty(2, 5, 16))


def test_product_of_a_router_is_not_rounded_forward_or_back_and_leaves_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, x, weight = list[str](), torch.randn(5, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)

    def mm(a: Tensor, b: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return a @ b

    monkeypatch.setattr(torch, "mm", mm)
    torch.set_float32_matmul_precision("high")  # a fixture of all tests sets it back
    found = torch.autograd.grad(precision._full_product(x, weight.t()).square().sum(), (x, weight))
    assert seen == ["ieee"] * 3 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.testing.assert_close(found, torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight)))
