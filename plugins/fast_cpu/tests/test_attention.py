"""Attention of few queries and of encoders: what the reference says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.kernels.attention import (
    causal_attention_reference,
    encoder_attention,
    encoder_attention_reference,
)
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.plugins.fast_cpu import batched_attention
from blockwright.plugins.fast_cpu import batched_attention as batched
from tests.blocks.kernels.compared import PRECISIONS, assert_same, drawn, leaves

CPU = torch.device("cpu")
EXTRAS: list[dict[str, Any]] = [{}, {"window": 5}, {"window": 1}, {"window": 99}, {"sinks": None}]
EXTRAS += [{"window": 5, "sinks": None}]


# --- few queries of a cache -------------------------------------------------------------------------------------------


def cached(B: int, S: int, dtype: torch.dtype, K: int = 2, V: int = 24, T: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """T queries of 6 heads, and S of the 19 tokens that a cache has room for."""
    cache = Cache(B, 19, {"k": (K, 16), "v": (K, V)}, dtype, CPU)
    kept = cache.append(drawn(B, S, K, 16, dtype=dtype, seed=1), drawn(B, S, K, V, dtype=dtype, seed=2))
    return drawn(B, T, 6, 16, dtype=dtype), *kept


def test_few_queries_are_the_references() -> None:
    sizes = [(1, 1, 1), (1, 1, 13), (3, 1, 19), (3, 2, 7), (1, 3, 13), (3, 5, 5)]
    for (B, T, S), K, biased, dtype in pairs(sizes, [1, 2, 6], [None, "rows", "heads"], [torch.float32, torch.float64]):
        q, k, v = cached(B, S, dtype, K, T=T)
        shape = {"rows": (B, 1, T, S), "heads": (1, 6, T, S)}.get(biased or "")
        hidden = (torch.arange(S) % 3 == 1) & (torch.arange(S) < S - T)  # each query sees itself
        scoring = Scoring(0.3, None if shape is None else drawn(*shape, dtype=dtype).masked_fill(hidden, -math.inf))
        found, bound = batched_attention.few_queries(q, k, v, scoring), 2e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(found, causal_attention_reference(q, k, v, scoring), rtol=0, atol=bound)


@torch.no_grad()
def test_few_queries_of_a_cache_are_taken_and_nothing_else() -> None:
    q, k, v = cached(3, 13, torch.float32)
    suits, plain = batched_attention.suits_few, Scoring(0.3)
    assert suits(q, k, v, plain) and suits(q, k, v, Scoring(0.3, window=13))
    refused: list[dict[str, Any]] = [{"window": 12}, {"segments": torch.zeros(3, 13)}, {"sinks": torch.zeros(6)}]
    assert not any(suits(q, k, v, Scoring(0.3, **more)) for more in [*refused, {"softcap": 2.0}])
    assert suits(q.expand(-1, 8, -1, -1), k, v, plain) and not suits(q.expand(-1, 9, -1, -1), k, v, plain)
    assert not suits(q, k.contiguous(), v, plain)  # tokens are not side by side
    assert not suits(q.double(), k.double(), v.double(), plain)


def test_heads_of_a_cache_stay_side_by_side_when_rows_are_taken() -> None:
    cache = Cache(3, 19, {"k": (2, 16), "latent": (5,)}, torch.float32, CPU)
    right = [t[[2, 0]].clone() for t in cache.append(torch.randn(3, 4, 2, 16), torch.randn(3, 4, 5))]
    cache.take(torch.tensor([2, 0]))
    found = cache.read(slice(0, 4))
    assert all(map(torch.equal, found, right)) and found[0].stride(1) == 16


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_encoders_attention_is_the_reference_in_one_part_and_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1, 16, 3, 5), (3, 7, 5, 6), (2, 1, 2, 4), (0, 3, 2, 4)]  # B, T, N, H; the last has no tile
    for shape, (dtype, bound), scores in pairs(shapes, list(PRECISIONS.items()), [2**22, 1]):
        monkeypatch.setattr(batched, "SCORES", scores)
        given = leaves(shape, shape, shape, dtype=dtype)
        assert_same(
            lambda *t: batched.batched_attention(*t, 0.4),
            lambda *t: encoder_attention_reference(*t, 0.4),
            given,
            bound,
            slack=1,
        )
        with torch.no_grad():
            y = batched.batched_attention(*given, 0.4)
        assert torch.equal(y, batched.batched_attention(*given, 0.4))


def test_long_sequences_and_autocast_go_to_torch() -> None:
    short, long = (torch.empty(1, T, 1, 2) for T in (batched.LONGEST, batched.LONGEST + 1))
    assert batched.suits(short, short, short, 1.0) and not batched.suits(long, long, long, 1.0)
    q, k, v = leaves(*[(2, 9, 3, 4)] * 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not batched.suits(short, short, short, 1.0)
        assert batched.suits(short.bfloat16(), short.bfloat16(), short.bfloat16(), 1.0)
        found, right = batched.batched_attention(q, k, v, 0.5), encoder_attention(q, k, v, 0.5)
    torch.testing.assert_close(found, right, rtol=4e-2, atol=4e-2)
