"""Attention by torch's kernel, by parts of a long memory: what the reference says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pairwise import each, pairs
from torch import Tensor

from blockwright.blocks.kernels import long_attention
from blockwright.blocks.kernels.attention import (
    as_called,
    causal_attention,
    causal_attention_reference,
    flash_takes,
    visible,
)
from blockwright.blocks.kernels.long_attention import attention_in_parts
from blockwright.blocks.kernels.scoring import Scoring, Slopes
from tests.blocks.kernels.compared import TIGHT, assert_same, drawn, leaves, wide

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
            monkeypatch.setattr(long_attention, "HELD", held)
            found = long_attention.largest_scores(q, k, Scoring(0.3, **case))
            torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    single = long_attention.largest_scores(q.float(), k.float(), Scoring(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(long_attention.largest_scores(q.float(), k.float(), Scoring(1.0)), single)


# --- a GPU ------------------------------------------------------------------------------------------------------------


def test_what_a_gpu_is_asked_for_is_what_the_reference_says() -> None:
    """Widths, groups and masks that torch's fused kernels of a GPU do not take are written as those that they do."""
    rows = pairs(list(SHAPES), EXTRAS, [False, True], [torch.float64, torch.bfloat16])
    for shape, extra, biased, dtype in rows:
        B, T, S, N, K, H, V = SHAPES[shape]
        options: dict[str, Any] = {**extra, "bias": drawn(1, N, T, S, dtype=dtype) if biased else None}
        if "sinks" in extra:
            options["sinks"] = drawn(N, seed=5, dtype=dtype)
        scoring = Scoring(0.7 / H**0.5, **options)
        q, k, v = (drawn(*s, dtype=dtype, seed=i) for i, s in enumerate(((B, T, N, H), (B, S, K, H), (B, S, K, V))))
        called = as_called(q, k, v, scoring, on_gpu=True)
        assert flash_takes(called) or (not called.grouped and called.q.shape[-1] % 8 == called.v.shape[-1] % 8 == 0)
        assert called.seen == "last" or called.mask is None or called.seen == "all"
        if called.seen == "last":
            called = called._replace(mask=visible(T, S, CPU), seen="all")  # CausalBias wants a GPU
        y = called.compute()
        y = (y.transpose(1, 2) if T > 1 else y.flatten(1, 2)[:, None])[..., :V]
        right = causal_attention_reference(
            *(wide(t) for t in (q, k, v)),
            scoring._replace(
                bias=wide(options["bias"]) if biased else None,
                sinks=wide(options["sinks"]) if "sinks" in extra else None,
            ),
        )
        torch.testing.assert_close(y.double(), right, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-2)
