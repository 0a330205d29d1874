"""Fused norms, gates and rotations compute what their formulas say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pairwise import pairs
from torch.autograd import gradcheck

from blockwright.blocks.kernels.elementwise import (
    gated_silu,
    gated_silu_reference,
    rms_norm,
    rms_norm_reference,
    rms_norm_torch,
    rotary_width,
    rotate_pairs,
    rotate_pairs_reference,
)
from blockwright.registry import BlockError
from tests.blocks.kernels.compared import assert_same, drawn, leaves

PRECISIONS = [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)]
SHAPES = [(33,), (5, 1), (3, 7, 33), (0, 8)]


def test_rms_norm_and_its_gradients_are_the_formulas() -> None:
    for shape, path, (dtype, tolerance) in pairs(SHAPES, [rms_norm, rms_norm_torch], PRECISIONS):
        given = leaves(shape, shape[-1:], dtype=dtype)
        right = lambda *t: rms_norm_reference(*t, 1e-5)  # noqa: E731
        assert_same(lambda *t, path=path: path(*t, 1e-5), right, given, tolerance, rtol=tolerance, slack=10)
    x, weight = drawn(5, 24).bfloat16().requires_grad_(), drawn(24).float().requires_grad_()  # a gain in single
    assert_same(
        lambda *t: rms_norm(*t, 1e-6), lambda *t: rms_norm_reference(*t, 1e-6), [x, weight], 4e-2, rtol=4e-2, slack=10
    )
    slices = drawn(4, 6, 10).requires_grad_()  # a slice, and a gradient that is one
    assert gradcheck(lambda x: rms_norm(x[..., 2:7], drawn(5).exp(), 1e-6).transpose(0, 1), slices)


def test_gated_silu_and_rotation_and_their_gradients_are_the_formulas() -> None:
    for (dtype, tolerance), width, interleaved in pairs(PRECISIONS, [4, 10], [False, True]):
        halves = [t.detach().requires_grad_() for t in drawn(7, 26, dtype=dtype).chunk(2, -1)]  # strided, of one tensor
        assert_same(gated_silu, gated_silu_reference, halves, tolerance, rtol=tolerance, slack=10)
        x = drawn(2, 5, 3, 13, dtype=dtype)[..., 3:].requires_grad_()  # a slice, as MLA's rope part is
        angles = drawn(2, 5, width // 2).float()
        turns = 1.3 * angles.cos(), 1.3 * angles.sin(), interleaved
        rotations: list[Callable] = [lambda x, f=f, t=turns: f(x, *t) for f in (rotate_pairs, rotate_pairs_reference)]
        assert_same(*rotations, [x], tolerance, rtol=tolerance, slack=10)


def test_without_gradients_the_numbers_are_the_same_and_the_inputs_stay() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gate, up, heads = drawn(3, 10, dtype=dtype), drawn(3, 10, dtype=dtype, seed=1), drawn(2, 3, 4, 10, dtype=dtype)
        weight, angles, before = drawn(10, dtype=dtype), drawn(1, 3, 4).float(), gate.clone()
        turned = [lambda i=i: rotate_pairs(heads, angles.cos(), angles.sin(), i) for i in (False, True)]  # noqa: B023
        for function in (lambda: rms_norm(gate, weight, 1e-6), lambda: gated_silu(gate, up), *turned):  # noqa: B023
            with torch.inference_mode():
                y = function()
            assert torch.equal(y, function()) and torch.equal(gate, before)


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers_do(interleaved: bool) -> None:
    x, angles = drawn(2, 5, 3, 10), drawn(1, 5, 3)
    turned = rotate_pairs(x, angles.cos(), angles.sin(), interleaved)
    for j in range(3):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + 3)
        z = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * angles[..., j, None])
        torch.testing.assert_close(turned[..., a], z.real, rtol=0, atol=1e-14)
        torch.testing.assert_close(turned[..., b], z.imag, rtol=0, atol=1e-14)
    assert torch.equal(turned[..., 6:], x[..., 6:])


def test_half_precision_is_turned_in_single_and_comes_back_in_half() -> None:
    x, angles = drawn(1, 7, 2, 4).bfloat16(), 100 * drawn(1, 7, 2).float()
    turned = rotate_pairs(x, angles.cos(), angles.sin(), False)
    assert torch.equal(turned, rotate_pairs(x.float(), angles.cos(), angles.sin(), False).bfloat16())


def test_width_is_that_fraction_of_the_head_and_without_pairs_it_is_refused() -> None:
    widths = {(64, 1.0): 64, (64, 0.5): 32, (80, 0.4): 32, (10, 0.25): 2}
    assert {given: rotary_width(*given) for given in widths} == widths
    for given in ((64, 0.0), (64, 1.5), (64, -1.0), (7, 1.0), (64, 0.01), (12, 0.25)):
        with pytest.raises(BlockError) as caught:
            rotary_width(*given)
        assert caught.value.parameter == "rotary_fraction" and caught.value.remedy
