"""Fused norms and gates compute what their formulas say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from blockwright.blocks.kernels.elementwise import (
    gated_silu,
    gated_silu_reference,
    rms_norm,
    rms_norm_reference,
    rms_norm_torch,
)
from blockwright.blocks.kernels.rotary import rotate_pairs, rotate_pairs_reference

PRECISIONS = [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)]


def assert_same(
    fused: Callable[..., Tensor], reference: Callable[..., Tensor], given: list[Tensor], tolerance: float
) -> None:
    wide = [t.detach().double().requires_grad_() for t in given]
    y, expected = fused(*given), reference(*wide)
    assert y.dtype == given[0].dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(y)
    got, right = torch.autograd.grad(y, given, cotangent), torch.autograd.grad(expected, wide, cotangent.double())
    for one, other, like in zip(got, right, given, strict=True):
        assert one.dtype == like.dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("shape", [(33,), (5, 1), (3, 7, 33), (0, 8)])
@pytest.mark.parametrize("path", [rms_norm, rms_norm_torch])
def test_rms_norm_and_its_gradients_are_the_formulas(
    path: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape[-1:]).to(dtype).requires_grad_()
    assert_same(lambda *t: path(*t, 1e-5), lambda *t: rms_norm_reference(*t, 1e-5), [x, weight], tolerance)


def test_rms_norm_of_half_precision_takes_a_gain_in_single() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 24).bfloat16().requires_grad_(), torch.randn(24, requires_grad=True)
    assert_same(lambda *t: rms_norm(*t, 1e-6), lambda *t: rms_norm_reference(*t, 1e-6), [x, weight], 4e-2)


def test_rms_norm_of_a_slice_and_of_a_gradient_that_is_one() -> None:
    x, weight = torch.randn(4, 6, 10, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    assert gradcheck(lambda x: rms_norm(x[..., 2:7], weight, 1e-6).transpose(0, 1), x)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_gated_silu_and_its_gradients_are_the_formulas(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    both = torch.randn(7, 2 * 13, dtype=dtype)
    given = [t.detach().requires_grad_() for t in both.chunk(2, -1)]  # strided halves of one tensor
    assert_same(gated_silu, gated_silu_reference, given, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("width", [4, 10])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_and_its_gradient_are_the_formulas(
    interleaved: bool, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 13, dtype=dtype)[..., 3:].requires_grad_()  # a slice, as MLA's rope part is
    angles = torch.randn(2, 5, width // 2)
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    assert_same(
        lambda x: rotate_pairs(x, cos, sin, interleaved),
        lambda x: rotate_pairs_reference(x, cos, sin, interleaved),
        [x],
        tolerance,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_without_gradients_the_numbers_are_the_same_and_the_inputs_stay(dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(0)
    gate, up, heads = (
        torch.randn(3, 10, dtype=dtype),
        torch.randn(3, 10, dtype=dtype),
        torch.randn(2, 3, 4, 10).to(dtype),
    )
    weight, angles = torch.rand(10, dtype=dtype), torch.randn(1, 3, 4)
    before = gate.clone()
    functions: list[Callable[[], Tensor]] = [
        lambda: rms_norm(gate, weight, 1e-6),
        lambda: gated_silu(gate, up),
        lambda: rotate_pairs(heads, angles.cos(), angles.sin(), interleaved),
    ]
    for function in functions:
        with torch.inference_mode():
            y = function()
        assert torch.equal(y, function()) and torch.equal(gate, before)
