from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.kernels import few_queries
from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.scoring import Scoring


def given(B: int, S: int, dtype: torch.dtype, K: int = 2, V: int = 24, T: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """T queries of 6 heads, and S of the 19 tokens that a cache has room for."""
    draws = torch.Generator().manual_seed(S)
    cache = Cache(B, 19, {"k": (K, 16), "v": (K, V)}, dtype, torch.device("cpu"))
    new = (torch.randn(B, S, K, width, generator=draws, dtype=dtype) for width in (16, V))
    return torch.randn(B, T, 6, 16, generator=draws, dtype=dtype), *cache.append(*new)


@pytest.mark.parametrize(
    ("size", "K", "biased", "dtype"),
    pairs(
        [(1, 1, 1), (1, 1, 13), (3, 1, 19), (3, 2, 7), (1, 3, 13), (3, 5, 5)],
        [1, 2, 6],
        [None, "rows", "heads"],
        [torch.float32, torch.float64],
    ),
)
def test_result_is_that_of_the_reference(
    size: tuple[int, int, int], K: int, biased: str | None, dtype: torch.dtype
) -> None:
    (B, T, S), bound = size, 2e-6 if dtype == torch.float32 else 1e-14
    q, k, v = given(B, S, dtype, K, T=T)
    shape = {"rows": (B, 1, T, S), "heads": (1, 6, T, S)}.get(biased or "")
    hidden = (torch.arange(S) % 3 == 1) & (torch.arange(S) < S - T)  # each query sees itself
    bias = None if shape is None else torch.randn(shape, dtype=dtype).masked_fill(hidden, float("-inf"))
    found = few_queries.few_queries(q, k, v, Scoring(0.3, bias))
    torch.testing.assert_close(found, causal_attention_reference(q, k, v, Scoring(0.3, bias)), rtol=0, atol=bound)


@torch.no_grad()
def test_it_takes_few_queries_of_a_cache_and_nothing_else() -> None:
    q, k, v = given(3, 13, torch.float32)
    assert few_queries.suits(q, k, v, Scoring(0.3)) and few_queries.suits(q, k, v, Scoring(0.3, window=13))
    refused: list[dict[str, Any]] = [
        {"window": 12},
        {"segments": torch.zeros(3, 13)},
        {"sinks": torch.zeros(6)},
        {"softcap": 2.0},
    ]
    assert not any(few_queries.suits(q, k, v, Scoring(0.3, **more)) for more in refused)
    assert few_queries.suits(q.expand(-1, 8, -1, -1), k, v, Scoring(0.3))
    assert not few_queries.suits(q.expand(-1, 9, -1, -1), k, v, Scoring(0.3))
    assert not few_queries.suits(q, k.contiguous(), v, Scoring(0.3))  # tokens are not side by side
    assert not few_queries.suits(q.double(), k.double(), v.double(), Scoring(0.3))


def test_heads_of_a_cache_stay_side_by_side_when_rows_are_taken() -> None:
    cache = Cache(3, 19, {"k": (2, 16), "latent": (5,)}, torch.float32, torch.device("cpu"))
    kept = cache.append(torch.randn(3, 4, 2, 16), torch.randn(3, 4, 5))
    right = [t[[2, 0]].clone() for t in kept]
    cache.take(torch.tensor([2, 0]))
    found = cache.read(slice(0, 4))
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True)) and found[0].stride(1) == 16
