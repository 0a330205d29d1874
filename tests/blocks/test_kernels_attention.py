"""The attention kernel computes what its reference says, in every shape and with every option."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from blocks.kernels.attention import causal_attention, causal_attention_reference, visible

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
    y, expected = causal_attention(*inputs, **chosen), causal_attention_reference(*inputs, **chosen)
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
    y = causal_attention(*inputs, **chosen)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in chosen.items()}
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), causal_attention_reference(*(x.double() for x in inputs), **wide), rtol=0, atol=tolerance
    )


def test_bias_in_single_precision_serves_queries_in_half() -> None:
    inputs = [x.detach() for x in random_inputs("odd", torch.bfloat16)]
    chosen = options("odd", torch.float32, True, False)
    assert causal_attention(*inputs, **chosen).dtype == torch.bfloat16


def test_kernel_passes_gradcheck() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, w, dtype=torch.float64, requires_grad=True) for n, w in ((4, 3), (2, 3), (2, 5)))
    bias = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 1, 1]])
    assert gradcheck(lambda *a: causal_attention(*a[:3], scale=0.5, bias=a[3], segments=segments), (q, k, v, bias))


def test_last_queries_see_all_that_came_before_and_nothing_after() -> None:
    assert visible(2, 4, torch.device("cpu"))[0, 0].tolist() == [[True, True, True, False], [True] * 4]


def test_each_document_sees_only_itself() -> None:
    mask = visible(3, 3, torch.device("cpu"), torch.tensor([[0, 0, 1], [4, 2, 2]]))
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert mask[1, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_scores_beyond_the_range_of_exponentials_give_no_nan() -> None:
    q, k, v = (x.detach() for x in random_inputs("odd", torch.float32))
    y = causal_attention(1e4 * q, 1e4 * k, v, scale=1.0)
    assert y.isfinite().all()
