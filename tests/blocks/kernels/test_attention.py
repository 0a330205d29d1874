"""Attention by torch's kernel, by parts of a long memory, of few queries, of encoders: what the reference says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pairwise import each, pairs
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.kernels import batched_attention as batched
from blockwright.blocks.kernels import few_queries, largest_score, long_attention
from blockwright.blocks.kernels.attention import causal_attention, causal_attention_reference, visible
from blockwright.blocks.kernels.encoder_attention import encoder_attention, encoder_attention_reference
from blockwright.blocks.kernels.long_attention import attention_in_parts
from blockwright.blocks.kernels.scoring import Scoring, Slopes
from tests.blocks.kernels.compared import PRECISIONS, TIGHT, assert_same, drawn, leaves, wide

CPU = torch.device("cpu")
# B, T, S, N, K, H, V. Lower precisions: every implementation's cases, in test_seam.py.
SHAPES = {
    "odd": (2, 63, 63, 6, 2, 5, 5),
    "chunk after a past": (2, 17, 63, 6, 2, 5, 7),
    "one token after a past": (2, 1, 63, 6, 2, 7, 5),
    "one token alone": (3, 1, 1, 4, 2, 4, 4),
    "even": (2, 16, 16, 4, 4, 8, 8),
    "one KV head": (1, 63, 63, 7, 1, 3, 3),
    "keys wider than values": (2, 33, 33, 6, 3, 11, 5),
    "values wider than keys": (2, 33, 33, 6, 3, 5, 11),
}
EXTRAS: list[dict[str, Any]] = [{}, {"window": 5}, {"window": 1}, {"window": 99}, {"sinks": None}]
EXTRAS += [{"window": 5, "sinks": None}]


def test_kernel_and_its_gradients_equal_the_reference() -> None:
    rows = [*pairs(list(SHAPES)[:4], EXTRAS, [False, True], [False, True]), *each(list(SHAPES), [{}], [True, False])]
    for shape, extra, biased, *segmented in rows:
        B, T, S, N, K, H, V = SHAPES[shape]
        options: dict[str, Any] = {**extra, "bias": drawn(1, N, T, S) if biased else None}
        options["segments"] = (torch.arange(S) // 20).expand(B, S) if segmented == [True] and S == T else None
        if "sinks" in extra:
            options["sinks"] = drawn(N, seed=5)
        scoring = Scoring(0.7 / H**0.5, **options)
        given = leaves((B, T, N, H), (B, S, K, H), (B, S, K, V))
        assert_same(
            lambda *t, s=scoring: causal_attention(*t, s),
            lambda *t, s=scoring: causal_attention_reference(*t, s),
            given,
            1e-12,
        )


def test_bias_in_single_precision_serves_queries_in_half_and_huge_scores_give_no_nan() -> None:
    q, k, v = (drawn(2, 63, n, 5, dtype=torch.float32) for n in (6, 2, 2))
    bias = drawn(1, 6, 63, 63, dtype=torch.float32)
    half = causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), Scoring(0.3, bias=bias))
    assert half.dtype == torch.bfloat16
    assert causal_attention(1e4 * q, 1e4 * k, v, Scoring(scale=1.0)).isfinite().all()


def test_each_document_sees_only_itself_and_last_queries_all_that_came_before() -> None:
    assert visible(2, 4, CPU)[0, 0].tolist() == [[True, True, True, False], [True] * 4]
    mask = visible(3, 3, CPU, torch.tensor([[0, 0, 1], [4, 2, 2]]))
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert mask[1, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_window_sink_and_softcap_are_their_formulas() -> None:
    q, k = torch.zeros(1, 9, 1, 4), torch.zeros(1, 9, 1, 4)
    weights = causal_attention(q, k, torch.eye(9)[None, :, None], Scoring(scale=1.0, window=3))[0, :, 0]
    assert [(row > 0).nonzero()[:, 0].tolist() for row in weights[[0, 1, 8]]] == [[0], [0, 1], [6, 7, 8]]
    sink = Scoring(scale=1.0, sinks=torch.tensor([math.log(3.0)]))
    y = causal_attention(q[:, :2], k[:, :2], torch.ones(1, 2, 1, 4), sink)
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor([1 / 4, 2 / 5]))
    q, k, v = drawn(2, 1, 4, 7), drawn(2, 2, 2, 7, seed=1), drawn(2, 2, 2, 7, seed=2)
    bias = torch.tensor([0.0, 1.5], dtype=torch.float64).expand(2, 4, 1, 2)
    y = causal_attention(q, k, v, Scoring(scale=9.0, bias=bias, softcap=2.0))  # squeezed before the bias
    shares = (2 * (torch.einsum("bqnh,bknh->bnqk", q, k.repeat_interleave(2, 2)) * 4.5).tanh() + bias).softmax(-1)
    right = torch.einsum("bnqk,bknh->bqnh", shares, v.repeat_interleave(2, 2))
    torch.testing.assert_close(y, right, rtol=0, atol=1e-12)


# --- keys and values that are read in parts ---------------------------------------------------------------------------

# B, T, S, N, K, H, V
LONG = [(2, 70, 333, 4, 2, 24, 16), (1, 129, 130, 8, 8, 16, 16), (1, 5, 77, 3, 1, 8, 12), (2, 64, 64, 2, 2, 8, 8)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and parts of keys at small sizes, some not full."""
    for name, value in (("ROWS", 32), ("SCORES", 2**12), ("PARTS", (16, 64))):
        monkeypatch.setattr(long_attention, name, value)


@pytest.mark.usefixtures("small_parts")
def test_parts_equal_the_reference() -> None:
    for (B, T, S, N, K, H, V), (dtype, tolerance), biased in pairs(LONG, list(TIGHT.items()), [False, True]):
        shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V), (B, N, T, S))
        q, k, v, bias = (drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
        bias[:, :, T // 2 :, : S // 2] = float("-inf")  # whole parts that some queries do not see
        given = (lambda rows, keys, b=bias: b[:, :, rows, keys]) if biased else None
        got = attention_in_parts(q, S, lambda keys, k=k, v=v: (k[:, keys], v[:, keys]), 0.3, given)
        right = causal_attention_reference(wide(q), wide(k), wide(v), Scoring(0.3, wide(bias) if biased else None))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), right, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("small_parts")
def test_large_scores_do_not_overflow_and_every_part_is_read_once() -> None:
    q, k, v = torch.full((1, 40, 1, 4), 30.0), torch.randn(1, 200, 1, 4) * 30, torch.randn(1, 200, 1, 4)
    asked: list[slice] = []

    def read(keys: slice) -> tuple[Tensor, Tensor]:
        asked.append(keys)
        return k[:, keys], v[:, keys]

    got = attention_in_parts(q[:, :20], 200, read, 1.0)
    right = causal_attention_reference(q[:, :20].double(), k.double(), v.double(), Scoring(1.0))
    torch.testing.assert_close(got.double(), right, rtol=0, atol=1e-3)
    assert [i for keys in asked for i in range(keys.start, keys.stop)] == list(range(200))
    assert max(keys.stop - keys.start for keys in asked) <= 64


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
        found, bound = few_queries.few_queries(q, k, v, scoring), 2e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(found, causal_attention_reference(q, k, v, scoring), rtol=0, atol=bound)


@torch.no_grad()
def test_few_queries_of_a_cache_are_taken_and_nothing_else() -> None:
    q, k, v = cached(3, 13, torch.float32)
    suits, plain = few_queries.suits, Scoring(0.3)
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


# --- the largest score ------------------------------------------------------------------------------------------------

B, T, S, N, K, H = 2, 11, 17, 6, 2, 5
IDS = torch.tensor([[0] * 3 + [1] * 9 + [2] * 5, [0] * 15 + [1] * 2])
HIDING = torch.zeros(B, 1, T, S, dtype=torch.float64).masked_fill_(torch.arange(S) % 3 == 1, -math.inf)
SLOPES = Slopes(torch.ones(N), torch.arange(T)[None], torch.arange(S)[None])  # which hide nothing
SEEN: list[dict[str, Any]] = [{}, {"segments": IDS}, {"window": 4}, {"bias": HIDING}, {"bias": SLOPES}]


def by_loop(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    found = torch.full((N,), -math.inf, dtype=q.dtype)
    for b, n, t in ((b, n, t) for b in range(B) for n in range(N) for t in range(T)):
        here = S - T + t
        for s in range(here + 1):
            hidden = scoring.window is not None and s <= here - scoring.window
            hidden |= scoring.segments is not None and bool(scoring.segments[b, s] != scoring.segments[b, here])
            hidden |= isinstance(scoring.bias, Tensor) and bool(scoring.bias[b, 0, t, s] == -math.inf)
            if not hidden:
                found[n] = max(found[n], scoring.scale * (q[b, t, n] @ k[b, s, n * K // N]))
    return found


def test_largest_score_is_over_what_is_seen_and_autocast_does_not_round_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = drawn(B, T, N, H), drawn(B, S, K, H, seed=1)
    for case in [*SEEN, {"segments": IDS, "window": 4, "bias": HIDING}]:
        right = by_loop(q, k, Scoring(0.3, **case))
        for held in (2**22, B * N * S * 3):
            monkeypatch.setattr(largest_score, "HELD", held)
            found = largest_score.largest_scores(q, k, Scoring(0.3, **case))
            torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    single = largest_score.largest_scores(q.float(), k.float(), Scoring(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(largest_score.largest_scores(q.float(), k.float(), Scoring(1.0)), single)
