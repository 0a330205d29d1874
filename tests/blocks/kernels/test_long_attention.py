"""Attention to keys and values that are read in parts."""

from __future__ import annotations

import pytest
import torch

from blockwright.blocks.kernels import long_attention
from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.long_attention import attention_in_parts
from blockwright.blocks.kernels.scoring import Scoring

# B, T, S, N, K, H, V
SIZES = [(2, 70, 333, 4, 2, 24, 16), (1, 129, 130, 8, 8, 16, 16), (1, 5, 77, 3, 1, 8, 12), (2, 64, 64, 2, 2, 8, 8)]
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and parts of keys at small sizes, some not full."""
    for name, value in (("ROWS", 32), ("SCORES", 2**12), ("PARTS", (16, 64))):
        monkeypatch.setattr(long_attention, name, value)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_reference(sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float, biased: bool) -> None:
    B, T, S, N, K, H, V = sizes
    draw = torch.Generator().manual_seed(0)
    q, k, v, bias = (
        torch.randn(shape, generator=draw).to(dtype)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, V), (B, N, T, S))
    )
    bias[:, :, T // 2 :, : S // 2] = float("-inf")  # whole parts that some queries do not see
    given = (lambda rows, keys: bias[:, :, rows, keys]) if biased else None
    got = attention_in_parts(q, S, lambda keys: (k[:, keys], v[:, keys]), 0.3, given)
    scoring = Scoring(0.3, bias.double() if biased else None)
    expected = causal_attention_reference(q.double(), k.double(), v.double(), scoring)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = torch.full((1, 40, 1, 4), 30.0), torch.randn(1, 200, 1, 4) * 30, torch.randn(1, 200, 1, 4)
    got = attention_in_parts(q, 200, lambda keys: (k[:, keys], v[:, keys]), 1.0)
    expected = causal_attention_reference(q.double(), k.double(), v.double(), Scoring(1.0))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-3)


def test_every_part_is_read_once_and_nothing_else() -> None:
    asked: list[slice] = []

    def read(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(keys)
        return torch.zeros(1, keys.stop - keys.start, 1, 4), torch.zeros(1, keys.stop - keys.start, 1, 4)

    attention_in_parts(torch.zeros(1, 100, 1, 4), 300, read, 1.0)
    assert [i for keys in asked for i in range(keys.start, keys.stop)] == list(range(300))
    assert max(keys.stop - keys.start for keys in asked) <= 64
