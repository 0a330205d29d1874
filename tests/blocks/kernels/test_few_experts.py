"""The path for a few tokens computes what the grouped path computes."""

from __future__ import annotations

import pytest
import torch

from blockwright.blocks.experts.swiglu import SwiGLUExperts
from blockwright.blocks.gating.base import Routing, count
from blockwright.blocks.kernels import experts as experts_module
from blockwright.blocks.kernels.few_experts import FEW, few

E, D, F = 6, 16, 8


def experts(dtype: torch.dtype) -> SwiGLUExperts:
    block = SwiGLUExperts(D, E, F)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(generator=generator)
    return block.to(dtype)


def routing(T: int, k: int, dropped: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(T)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(T)])
    chosen.view(-1)[torch.randperm(T * k, generator=generator)[:dropped]] = E
    weights = torch.rand(T, k, generator=generator)
    return Routing(chosen, weights, weights, {}, count(chosen, E), T * k - dropped if dropped else None)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize(("T", "k", "dropped"), [(1, 1, 0), (1, 4, 0), (7, 2, 0), (7, 3, 5), (2, 2, 4)])
@torch.no_grad()
def test_few_tokens_get_what_many_get(
    T: int, k: int, dropped: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, r = experts(dtype), routing(T, k, dropped)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = block(x, r)
    monkeypatch.setattr(experts_module, "few", lambda _: False)
    expected = block(x, r)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound * expected.abs().max().item())


def test_only_a_few_and_never_where_gradients_are_asked_for() -> None:
    chosen = torch.zeros(FEW // 4, 4, dtype=torch.long)
    assert not few(chosen)
    with torch.no_grad():
        assert few(chosen) and not few(torch.zeros(FEW // 4 + 1, 4, dtype=torch.long)) and not few(chosen.to("meta"))


@torch.no_grad()
def test_experts_that_no_token_chose_are_not_read() -> None:
    block, r = experts(torch.float32), routing(1, 2)
    idle = [e for e in range(E) if e not in r.experts]
    x = torch.randn(1, D)
    expected = block(x, r)
    block.gate_up[idle] = float("nan")
    block.down[idle] = float("nan")
    assert torch.equal(block(x, r), expected)


def test_a_few_tokens_without_gradients_take_the_short_way_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def spy(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        taken.append(len(x))
        return torch.zeros_like(x)

    monkeypatch.setattr(experts_module, "few_swiglu", spy)
    block = experts(torch.float32)
    for T in (2, FEW):
        with torch.no_grad():
            block(torch.randn(T, D), routing(T, 2))
        block(torch.randn(T, D), routing(T, 2))
    assert taken == [2]
