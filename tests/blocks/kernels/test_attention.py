"""The attention kernel computes what its reference says, in every shape and with every option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from blockwright.blocks.kernels.attention import causal_attention, causal_attention_reference, visible
from blockwright.blocks.kernels.scoring import Scoring

# B, T, S, N, K, H, V
SHAPES = {
    "even": (2, 16, 16, 4, 4, 8, 8),
    "odd": (2, 63, 63, 6, 2, 5, 5),
    "one KV head": (1, 63, 63, 7, 1, 3, 3),
    "keys wider than values": (2, 33, 33, 6, 3, 11, 5),
    "values wider than keys": (2, 33, 33, 6, 3, 5, 11),
    "chunk after a past": (2, 17, 63, 6, 2, 5, 7),
    "one token after a past": (2, 1, 63, 6, 2, 7, 5),
    "one token alone": (3, 1, 1, 4, 2, 4, 4),
}


def random_inputs(shape: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    B, T, S, N, K, H, V = SHAPES[shape]
    torch.manual_seed(seed)
    return (
        torch.randn(B, T, N, H, dtype=dtype, requires_grad=True),
        torch.randn(B, S, K, H, dtype=dtype, requires_grad=True),
        torch.randn(B, S, K, V, dtype=dtype, requires_grad=True),
    )


def options(shape: str, dtype: torch.dtype, with_bias: bool, with_segments: bool) -> dict[str, Tensor | float | None]:
    B, T, S, N, _, H, _ = SHAPES[shape]
    bias = torch.randn(1, N, T, S, dtype=dtype) if with_bias else None
    segments = torch.randint(0, 2, (B, T)).cumsum(1) // 5 if with_segments else None
    return {"scale": 0.7 / H**0.5, "bias": bias, "segments": segments}


CASES = [
    pytest.param(shape, bias, segments, id=f"{shape}{', bias' * bias}{', packed' * segments}")
    for shape, (_, T, S, *_) in SHAPES.items()
    for bias in (False, True)
    for segments in (False, True)[: 1 + (S == T)]
]


@pytest.mark.parametrize(("shape", "with_bias", "with_segments"), CASES)
def test_kernel_and_its_gradients_equal_the_reference(shape: str, with_bias: bool, with_segments: bool) -> None:
    inputs = random_inputs(shape, torch.float64)
    chosen = options(shape, torch.float64, with_bias, with_segments)
    y, expected = causal_attention(*inputs, Scoring(**chosen)), causal_attention_reference(*inputs, Scoring(**chosen))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(y)
    for got, right in zip(
        torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_stays_near_the_reference_in_double(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [x.detach() for x in random_inputs(shape, dtype)]
    chosen = options(shape, dtype, True, False)
    y = causal_attention(*inputs, Scoring(**chosen))
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in chosen.items()}
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), causal_attention_reference(*(x.double() for x in inputs), Scoring(**wide)), rtol=0, atol=tolerance
    )


def test_bias_in_single_precision_serves_queries_in_half() -> None:
    inputs = [x.detach() for x in random_inputs("odd", torch.bfloat16)]
    chosen = options("odd", torch.float32, True, False)
    assert causal_attention(*inputs, Scoring(**chosen)).dtype == torch.bfloat16


def test_kernel_passes_gradcheck() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, w, dtype=torch.float64, requires_grad=True) for n, w in ((4, 3), (2, 3), (2, 5)))
    bias = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 1, 1]])
    assert gradcheck(lambda *a: causal_attention(*a[:3], Scoring(0.5, bias=a[3], segments=segments)), (q, k, v, bias))


def test_last_queries_see_all_that_came_before_and_nothing_after() -> None:
    assert visible(2, 4, torch.device("cpu"))[0, 0].tolist() == [[True, True, True, False], [True] * 4]


def test_each_document_sees_only_itself() -> None:
    mask = visible(3, 3, torch.device("cpu"), torch.tensor([[0, 0, 1], [4, 2, 2]]))
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert mask[1, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_scores_beyond_the_range_of_exponentials_give_no_nan() -> None:
    q, k, v = (x.detach() for x in random_inputs("odd", torch.float32))
    y = causal_attention(1e4 * q, 1e4 * k, v, Scoring(scale=1.0))
    assert y.isfinite().all()


# --- windows, sinks, soft caps ----------------------------------------------------------------------------------------

EXTRAS: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window beyond the sequence": {"window": 99},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "window and sinks": {"window": 5, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
}


def drawn(T: int, S: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, L, n, 7, generator=g, dtype=dtype) for L, n in ((T, 4), (S, 2), (S, 2)))  # type: ignore[return-value]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("T", "S"), [(63, 63), (1, 63), (9, 63)])
def test_extras_equal_the_reference(T: int, S: int, extra: str, biased: bool, segmented: bool) -> None:
    if segmented and T != S:
        return
    q, k, v = drawn(T, S)
    bias = torch.randn(1, 4, T, S, dtype=torch.float64) if biased else None
    segments = (torch.arange(63) // 20).expand(2, 63) if segmented else None
    given = {"scale": 0.3, "bias": bias, "segments": segments, **EXTRAS[extra]}
    expected = causal_attention_reference(q, k, v, Scoring(**given))
    torch.testing.assert_close(causal_attention(q, k, v, Scoring(**given)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_hold_in_lower_precision(extra: str, dtype: torch.dtype, bound: float) -> None:
    q, k, v = drawn(63, 63, torch.float64)
    expected = causal_attention_reference(q, k, v, Scoring(scale=0.3, **EXTRAS[extra]))
    y = causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), Scoring(scale=0.3, **EXTRAS[extra]))
    assert y.dtype == dtype and (y.double() - expected).abs().max() < bound


def test_window_sees_that_many_tokens_itself_included() -> None:
    q, k = torch.zeros(1, 9, 1, 4), torch.zeros(1, 9, 1, 4)
    v = torch.eye(9)[None, :, None]
    weights = causal_attention(q, k, v, Scoring(scale=1.0, window=3))[0, :, 0]
    assert [(row > 0).nonzero()[:, 0].tolist() for row in weights[[0, 1, 8]]] == [[0], [0, 1], [6, 7, 8]]


def test_a_sink_takes_its_share_of_the_weight() -> None:
    q, k, v = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), torch.ones(1, 2, 1, 4)
    y = causal_attention(q, k, v, Scoring(scale=1.0, sinks=torch.tensor([math.log(3.0)])))
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor([1 / 4, 2 / 5]))


def test_softcap_squeezes_scores_before_the_bias() -> None:
    q, k, v = drawn(1, 2)
    bias = torch.tensor([0.0, 1.5], dtype=torch.float64).expand(2, 4, 1, 2)
    y = causal_attention(q, k, v, Scoring(scale=9.0, bias=bias, softcap=2.0))
    scores = torch.einsum("bqnh,bknh->bnqk", q, k.repeat_interleave(2, 2)) * 9
    weights = (2 * (scores / 2).tanh() + bias).softmax(-1)
    torch.testing.assert_close(
        y, torch.einsum("bnqk,bknh->bqnh", weights, v.repeat_interleave(2, 2)), rtol=0, atol=1e-12
    )
