"""Attention of encoders by batched products computes what the reference says, in one part and in several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockwright.blocks.kernels import batched_attention as module
from blockwright.blocks.kernels.batched_attention import LONGEST, batched_attention, suits
from blockwright.blocks.kernels.encoder_attention import encoder_attention, encoder_attention_reference

SHAPES = {
    "one tile": (1, 16, 3, 5),
    "odd": (3, 7, 5, 6),
    "one token": (2, 1, 2, 4),
    "no tile": (0, 3, 2, 4),
}  # B, T, N, H
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 4e-2)]


def drawn(B: int, T: int, N: int, H: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, T, N, H).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("scores", [2**22, 1], ids=["one part", "parts"])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(
    shape: str, dtype: torch.dtype, bound: float, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORES", scores)
    given = drawn(*SHAPES[shape], dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    y, true = batched_attention(*given, 0.4), encoder_attention_reference(*exact, 0.4)
    back = torch.randn(y.shape, dtype=dtype)
    grads, true_grads = torch.autograd.grad(y, given, back), torch.autograd.grad(true, exact, back.double())
    for found, wanted in zip((y, *grads), (true, *true_grads), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)
    with torch.no_grad():
        assert torch.equal(batched_attention(*given, 0.4), y)


def test_long_sequences_and_autocast_go_to_torch() -> None:
    short, long = (torch.empty(1, T, 1, 2) for T in (LONGEST, LONGEST + 1))
    assert suits(short, short, short, 1.0) and not suits(long, long, long, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(short, short, short, 1.0)
        assert suits(short.bfloat16(), short.bfloat16(), short.bfloat16(), 1.0)


def test_it_trains_as_torchs_does_under_autocast() -> None:
    q, k, v = drawn(2, 9, 3, 4, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            batched_attention(q, k, v, 0.5), encoder_attention(q, k, v, 0.5), rtol=4e-2, atol=4e-2
        )
