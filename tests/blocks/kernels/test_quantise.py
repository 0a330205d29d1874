"""Quantised numbers: the packing holds every code, and the rounding is as fine as its bits."""

from __future__ import annotations

import pytest
import torch

from blockwright.blocks.kernels.quantise import BITS, code_bytes, dequantise, group_sizes, pack, quantise, unpack


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 23, 64, 160])
@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_every_code_in_no_more_bytes_than_promised(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, code_bytes(width, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, width), codes)


def test_six_bits_are_truly_packed() -> None:
    assert [code_bytes(64, bits) for bits in BITS] == [64, 48, 32]
    assert [code_bytes(5, bits) for bits in BITS] == [5, 6, 3]


def test_extreme_codes_survive_side_by_side() -> None:
    for bits in BITS:
        codes = torch.tensor([0, 2**bits - 1] * 4, dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 8), codes)


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [([64], [64]), ([128, 32], [64, 64, 32]), ([96, 12], [48, 48, 12]), ([65], [33, 32]), ([1], [1])],
)
def test_groups_cut_each_part_evenly_and_cross_none(parts: list[int], sizes: list[int]) -> None:
    assert group_sizes(parts) == sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_no_number_moves_by_more_than_half_a_level(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(7, 3, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    sizes = group_sizes([128, 32])
    back = dequantise(*quantise(x, bits, sizes), bits, sizes, dtype)
    assert back.dtype == dtype and back.shape == x.shape
    for group, got in zip(x.double().split(sizes, -1), back.double().split(sizes, -1), strict=True):
        largest = group.abs().amax(-1, keepdim=True)
        level = largest / (2 ** (bits - 1) - 1)
        off = (group - got).abs()
        slack = 0.004 * largest + (0.004 * group.abs() if dtype == torch.bfloat16 else 0)  # of bf16 scales and values
        assert (off <= level / 2 + slack).all()


def test_a_large_group_does_not_coarsen_its_neighbour() -> None:
    x = torch.cat((torch.full((1, 64), 1000.0), torch.linspace(-1, 1, 32)[None]), -1)
    sizes = group_sizes([64, 32])
    back = dequantise(*quantise(x, 8, sizes), 8, sizes, torch.float32)
    assert (back[:, 64:] - x[:, 64:]).abs().max() < 0.01


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_sizes_come_back(value: float) -> None:
    x = torch.full((2, 8), value)
    back = dequantise(*quantise(x, 6, [8]), 6, [8], torch.float32)
    torch.testing.assert_close(back, x, rtol=0.01, atol=0)


def test_what_was_rounded_once_stays() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for bits in BITS:
        once = dequantise(*quantise(x, bits, [64]), bits, [64], torch.float32)
        torch.testing.assert_close(dequantise(*quantise(once, bits, [64]), bits, [64], torch.float32), once)
