"""Turning pairs of dimensions."""

from __future__ import annotations

import pytest
import torch

from blockwright.blocks.kernels.rotary import rotary_width, rotate_pairs
from blockwright.registry import BlockError


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers_do(interleaved: bool) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 5, 3, 10, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    turned = rotate_pairs(x, angles.cos(), angles.sin(), interleaved)
    for j in range(3):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + 3)
        z = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * angles[..., j, None])
        torch.testing.assert_close(turned[..., a], z.real, rtol=0, atol=1e-14)
        torch.testing.assert_close(turned[..., b], z.imag, rtol=0, atol=1e-14)
    assert torch.equal(turned[..., 6:], x[..., 6:])


def test_half_precision_is_turned_in_single_and_comes_back_in_half() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(1, 7, 2, 4).bfloat16(), 100 * torch.randn(1, 7, 2)
    turned = rotate_pairs(x, angles.cos(), angles.sin(), False)
    assert torch.equal(turned, rotate_pairs(x.float(), angles.cos(), angles.sin(), False).bfloat16())


@pytest.mark.parametrize(
    ("head_dim", "fraction", "width"), [(64, 1.0, 64), (64, 0.5, 32), (80, 0.4, 32), (10, 0.25, 2)]
)
def test_width_is_that_fraction_of_the_head(head_dim: int, fraction: float, width: int) -> None:
    assert rotary_width(head_dim, fraction) == width


@pytest.mark.parametrize(("head_dim", "fraction"), [(64, 0.0), (64, 1.5), (64, -1.0), (7, 1.0), (64, 0.01), (12, 0.25)])
def test_width_without_pairs_is_refused(head_dim: int, fraction: float) -> None:
    with pytest.raises(BlockError) as caught:
        rotary_width(head_dim, fraction)
    assert caught.value.parameter == "rotary_fraction" and caught.value.remedy
