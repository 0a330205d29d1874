"""Balance losses against golden values and a gradient made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import registry
from blocks.balance.base import Balance
from blocks.balance.expert import ExpertBalance

LOGITS = torch.tensor(
    [[0.9, -0.3, 0.2, 1.1, -0.7, 0.4, 0.05, 0.6], [-0.2, 0.8, 1.3, -0.5, 0.1, 0.35, 0.9, -1.0]], dtype=torch.float64
)
GREEDY = torch.tensor([[3, 0, 7], [2, 6, 1]])
GROUP_LIMITED = torch.tensor([[3, 0, 2], [2, 6, 3]])


def loss(probs: Tensor, experts: Tensor, alpha: float = 1.0) -> Tensor:
    """Of sequences [B,T,·] or of one [T,·]."""
    probs, experts = (x if x.ndim == 3 else x[None] for x in (probs, experts))
    (value,) = ExpertBalance(probs.shape[-1], experts.shape[-1], alpha)(probs, experts).values()
    return value


@pytest.mark.parametrize(
    ("probs", "experts", "golden"),
    [
        (LOGITS.softmax(-1), GREEDY, 1.0926527160),
        (LOGITS.softmax(-1), GROUP_LIMITED, 1.2713695277),
        (LOGITS.sigmoid(), LOGITS.sigmoid().topk(3).indices, 1.0276356117),
    ],
    ids=["greedy", "group limited", "V3's, of sigmoids"],
)
def test_expert_loss_is_the_golden_one(probs: Tensor, experts: Tensor, golden: float) -> None:
    assert loss(probs, experts).item() == pytest.approx(golden, rel=1e-9)
    assert loss(probs, experts, 0.003).item() == pytest.approx(0.003 * golden, rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_even_routing_gives_alpha_whatever_k(k: int) -> None:
    experts = torch.stack([(torch.arange(k) + t) % 4 for t in range(8)])
    assert loss(torch.full((8, 4), 0.25), experts, 0.7).item() == pytest.approx(0.7)


def test_collapse_costs_more_than_even_routing() -> None:
    experts = torch.zeros(8, 1, dtype=torch.long)
    assert loss(torch.tensor([1.0, 0, 0, 0]).expand(8, 4), experts).item() == pytest.approx(4.0)


def test_each_sequence_is_balanced_by_itself_and_the_batch_averaged() -> None:
    torch.manual_seed(0)
    probs, experts = torch.rand(3, 5, 6), torch.stack([torch.rand(5, 6).topk(2).indices for _ in range(3)])
    alone = torch.stack([loss(p, e) for p, e in zip(probs, experts, strict=True)])
    torch.testing.assert_close(loss(probs, experts), alone.mean())
    pooled = loss(probs.flatten(0, 1), experts.flatten(0, 1))
    assert (loss(probs, experts) - pooled).abs() > 1e-4  # not one count over the whole batch


def test_gradient_flows_through_the_affinities_only() -> None:
    """dL/dlogit of α Σ f_i mean_t s_i, f held fixed: α/T · s_j (f_j − Σ_i f_i s_i)."""
    logits, alpha, T = LOGITS.clone().requires_grad_(), 0.3, 2
    s = logits.softmax(-1)
    loss(s, GREEDY, alpha).backward()
    f = torch.bincount(GREEDY.flatten(), minlength=8).double() * 8 / (3 * T)
    s = s.detach()
    expected = alpha / T * s * (f - (f * s).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


def test_gradient_pushes_the_overloaded_expert_down() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    loss(logits.softmax(-1), torch.tensor([[0], [0], [0], [1]])).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 2] < 0).all()


@pytest.mark.parametrize("gate", registry.names("gating"))
def test_gate_hands_over_whole_affinities_and_the_choices_it_made(make_block: Callable[..., Any], gate: str) -> None:
    node = {"name": gate, "top_k": 3, "balance": {"name": "expert", "alpha": 0.25}}
    block, x = make_block("gating", node, n_experts=8), torch.randn(2, 9, 48, dtype=torch.float64)
    routing = block(x)
    probs, experts = routing.probs.unflatten(0, (2, 9)), routing.experts.unflatten(0, (2, 9))
    torch.testing.assert_close(routing.losses["expert_balance"], loss(probs, experts, 0.25), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", registry.names("balance"))
def test_every_balance_reports_named_scalars_with_a_gradient(make_block: Callable[..., Any], name: str) -> None:
    balance: Balance = make_block("balance", name, n_experts=8, top_k=3)
    probs = LOGITS.softmax(-1)[None].requires_grad_()
    losses = balance(probs, GREEDY[None])
    assert losses
    for value in losses.values():
        assert value.shape == () and value.isfinite()
        assert torch.autograd.grad(value, probs, retain_graph=True)[0].norm() > 0
