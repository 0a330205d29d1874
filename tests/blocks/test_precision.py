"""Routing state keeps its precision however a model is built or cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from blockwright.blocks import precision
from blockwright.blocks.compose import compose
from blockwright.blocks.gating.base import count
from blockwright.blocks.gating.sigmoid_bias import SigmoidBias
from blockwright.blocks.gating.softmax_topk import SoftmaxTopK

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


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_router_on_a_gpu_multiplies_by_the_product_that_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReachedError(Exception):
        pass

    def reached(a: Tensor, b: Tensor) -> Tensor:
        raise ReachedError

    monkeypatch.setattr(precision, "_full_product", reached)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), pytest.raises(ReachedError):
        SoftmaxTopK(d_model=16, n_experts=8, top_k=2)(torch.empty(2, 5, 16))


def test_product_of_a_router_is_not_rounded_forward_or_back_and_leaves_the_setting(
    tf32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def mm(a: Tensor, b: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return a @ b

    monkeypatch.setattr(torch, "mm", mm)
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((5, 16), (8, 16)))

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), (x, weight))

    found = gradients(precision._full_product(x, weight.t()))
    assert seen == ["ieee"] * 3 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    for got, right in zip(found, gradients(F.linear(x, weight)), strict=True):
        torch.testing.assert_close(got, right)
