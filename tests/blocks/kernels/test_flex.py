"""FlexAttention, run as written on the CPU, computes what the reference does, for every option and their mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blocks.kernels import flex
from blocks.kernels.attention import causal_attention_reference
from blocks.kernels.flex import flex_causal_attention
from blocks.kernels.scoring import Scoring

B, T, N, H = 2, 13, 4, 8
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


SEGMENTS = torch.tensor([[0] * 5 + [1] * 8, [0] * 13])
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 4},
    "documents": {"segments": SEGMENTS},
    "bias": {"bias": draw(1, N, T, T)},
    "bias of each row": {"bias": draw(B, N, T, T)},
    "sinks": {"sinks": draw(N)},
    "softcap": {"softcap": 2.0},
    "all": {"window": 6, "segments": SEGMENTS, "bias": draw(1, N, T, T), "sinks": draw(N), "softcap": 3.0},
}


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses its backward pass on a CPU, where the operator run as written has one."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.mark.parametrize(
    ("name", "kv_heads", "width"),
    [
        ("all", 2, 8),
        *(pytest.param(name, 2, 8, marks=pytest.mark.slow) for name in OPTIONS if name != "all"),
        *(pytest.param("all", *shape, marks=pytest.mark.slow) for shape in ((4, 8), (1, 4), (4, 12))),
    ],
)
def test_result_and_gradients_equal_the_reference(backwards: None, name: str, kv_heads: int, width: int) -> None:
    given = [draw(B, T, N, H), draw(B, T, kv_heads, H), draw(B, T, kv_heads, width)]
    weigh, sides = draw(B, T, N, width), []
    for attend in (flex_causal_attention, causal_attention_reference):
        options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
        learnt = [t.clone().requires_grad_() for t in given]
        if "sinks" in options:
            learnt.append(options["sinks"].requires_grad_())
        y = attend(*learnt[:3], Scoring(0.3, **options))
        sides.append([y, *torch.autograd.grad((y * weigh).sum(), learnt)])
    for got, right in zip(*sides, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "window", "sinks"])
def test_last_tokens_see_all_that_came_before(name: str) -> None:
    q, k, v = draw(B, 3, N, H), draw(B, T, N, H), draw(B, T, N, H)
    got = flex_causal_attention(q, k, v, Scoring(0.3, **OPTIONS[name]))
    torch.testing.assert_close(
        got, causal_attention_reference(q, k, v, Scoring(0.3, **OPTIONS[name])), rtol=1e-4, atol=1e-5
    )


def test_mask_of_a_shape_and_window_is_made_once_and_that_of_documents_each_time() -> None:
    flex._shared_mask.cache_clear()
    cpu = torch.device("cpu")
    for window in (None, None, 4, 4):
        flex._block_mask(T, T, cpu, SEGMENTS, window)
        flex._block_mask(T, T, cpu, None, window)
    assert flex._shared_mask.cache_info().misses == 2


def test_blocks_outside_the_window_are_left_out_of_the_mask() -> None:
    whole, near = (flex._shared_mask(1024, 1024, window, torch.device("cpu")) for window in (None, 128))
    assert near.sparsity() > whole.sparsity() > 40
