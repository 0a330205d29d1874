"""A part of a draw is bit-identical to that part of the whole draw, and costs no more than the part."""

from __future__ import annotations

import pytest
import torch

from blockwright.blocks.skipping import draw_part, skip


@pytest.mark.parametrize("n", [16, 624, 10_000, 1 << 20])
def test_generator_that_skips_continues_as_one_that_drew(n: int) -> None:
    one, other = (torch.Generator().manual_seed(11) for _ in range(2))
    torch.empty(n).normal_(generator=one)
    skip(other, n)
    assert torch.equal(torch.randn(4000, generator=one), torch.randn(4000, generator=other))


@pytest.mark.parametrize(
    ("shape", "part", "offset"),
    [
        ((40, 64, 48), (7, 10, 48), (13, 20, 0)),
        ((33, 16), (1, 16), (32, 0)),
        ((64, 80), (64, 13), (0, 67)),
        ((9, 7), (3, 7), (2, 0)),  # rows that are no whole blocks
        ((9, 7), (9, 7), (0, 0)),
        ((8, 32), (0, 32), (8, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_part_is_what_the_whole_has_there(
    shape: tuple[int, ...], part: tuple[int, ...], offset: tuple[int, ...], dtype: torch.dtype
) -> None:
    whole = torch.empty(shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(7)).to(dtype)
    own = torch.empty(part, dtype=dtype)
    draw_part(own, torch.Size(shape), offset, 0.02, 7)
    assert torch.equal(own, whole[tuple(slice(o, o + n) for o, n in zip(offset, part, strict=True))])
    assert own.numel() == torch.Size(part).numel()
