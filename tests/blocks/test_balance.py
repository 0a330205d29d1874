"""Balance losses against golden values, other implementations, and a gradient made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.balance import (
    Balance,
    CommunicationBalance,
    DeviceBalance,
    ExpertBalance,
    HFExpertBalance,
    RouterZLoss,
)
from tests.blocks.small import Make, near

LOGITS = torch.tensor(
    [[0.9, -0.3, 0.2, 1.1, -0.7, 0.4, 0.05, 0.6], [-0.2, 0.8, 1.3, -0.5, 0.1, 0.35, 0.9, -1.0]], dtype=torch.float64
)
PROBS = LOGITS.softmax(-1)
GREEDY, LIMITED = torch.tensor([[3, 0, 7], [2, 6, 1]]), torch.tensor([[3, 0, 2], [2, 6, 3]])


def value_of(balance: Balance, probs: Tensor = PROBS, experts: Tensor = LIMITED) -> Tensor:
    """Of sequences [B,T,·] or of one [T,·]."""
    probs, experts = (x if x.ndim == 3 else x[None] for x in (probs, experts))
    (value,) = balance(probs, experts, probs.log()).values()
    return value


def loss(probs: Tensor, experts: Tensor, alpha: float = 1.0) -> Tensor:
    return value_of(ExpertBalance(probs.shape[-1], experts.shape[-1], alpha), probs, experts)


@pytest.mark.parametrize(
    ("balance", "probs", "experts", "golden"),
    [
        (ExpertBalance(8, 3, 1.0), PROBS, GREEDY, 1.0926527160),
        (ExpertBalance(8, 3, 1.0), PROBS, LIMITED, 1.2713695277),
        (ExpertBalance(8, 3, 1.0), LOGITS.sigmoid(), LOGITS.sigmoid().topk(3).indices, 1.0276356117),  # V3's
        (DeviceBalance(8, 3, 4, 1.0), PROBS, LIMITED, 1.2276379371),
        (CommunicationBalance(8, 3, 4, 2, 1.0), PROBS, LIMITED, 1.1601453266),
    ],
    ids=["greedy", "group limited", "of sigmoids", "device", "communication"],
)
def test_losses_are_the_golden_ones(balance: Any, probs: Tensor, experts: Tensor, golden: float) -> None:
    assert value_of(balance, probs, experts).item() == pytest.approx(golden, rel=1e-9)
    balance.alpha = 0.003
    assert value_of(balance, probs, experts).item() == pytest.approx(0.003 * golden, rel=1e-9)
    balance.alpha = 1.0


def test_even_routing_costs_alpha_and_collapse_more() -> None:
    for k in (1, 2, 4):
        experts = torch.stack([(torch.arange(k) + t) % 4 for t in range(8)])
        assert loss(torch.full((8, 4), 0.25), experts, 0.7).item() == pytest.approx(0.7)
    collapsed = torch.tensor([1.0, 0, 0, 0]).expand(8, 4)
    assert loss(collapsed, torch.zeros(8, 1, dtype=torch.long)).item() == pytest.approx(4.0)


def test_each_sequence_is_balanced_by_itself_and_the_batch_averaged() -> None:
    torch.manual_seed(0)
    probs, experts = torch.rand(3, 5, 6), torch.stack([torch.rand(5, 6).topk(2).indices for _ in range(3)])
    torch.testing.assert_close(loss(probs, experts), torch.stack(list(map(loss, probs, experts))).mean())
    pooled = loss(probs.flatten(0, 1), experts.flatten(0, 1))
    assert (loss(probs, experts) - pooled).abs() > 1e-4  # not one count over the whole batch


def test_gradient_flows_through_the_affinities_only_and_pushes_the_overloaded_expert_down() -> None:
    """dL/dlogit of α Σ f_i mean_t s_i, f held fixed: α/T · s_j (f_j − Σ_i f_i s_i)."""
    logits, alpha, T = LOGITS.clone().requires_grad_(), 0.3, 2
    loss(logits.softmax(-1), GREEDY, alpha).backward()
    f = torch.bincount(GREEDY.flatten(), minlength=8).double() * 8 / (3 * T)
    near(logits.grad, alpha / T * PROBS * (f - (f * PROBS).sum(-1, keepdim=True)))
    logits = torch.zeros(4, 3, requires_grad=True)
    loss(logits.softmax(-1), torch.tensor([[0], [0], [0], [1]])).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 2] < 0).all()


# Gates without affinities, with any number of experts, or with experts that every token has, which no loss balances.
OTHERS = "hash", "hash_softplus", "expert_choice", "expert_threshold", "sigmoid_sink"


def test_gates_hand_over_whole_affinities_and_the_choices_they_made(make_block: Make) -> None:
    for gate in set(registry.names("gating")) - set(OTHERS):
        node = {"name": gate, "top_k": 3, "balance": {"name": "expert", "alpha": 0.25}}
        routing = make_block("gating", node, n_experts=8)(torch.randn(2, 9, 48, dtype=torch.float64))
        right = loss(routing.probs.unflatten(0, (2, 9)), routing.experts.unflatten(0, (2, 9)), 0.25)
        torch.testing.assert_close(routing.losses["expert_balance"], right, rtol=1e-6, atol=0, msg=gate)


def test_a_gate_with_shared_experts_balances_the_routed_ones_alone(make_block: Make) -> None:
    node = {"name": "sigmoid_sink", "top_k": 4, "n_shared": 2, "balance": {"name": "expert", "alpha": 0.25}}
    routing = make_block("gating", node, n_experts=8)(torch.randn(2, 9, 48, dtype=torch.float64))
    right = loss(routing.probs[:, :6].unflatten(0, (2, 9)), routing.experts[:, :2].unflatten(0, (2, 9)), 0.25)
    torch.testing.assert_close(routing.losses["expert_balance"], right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["expert", "device", "communication", "hf_expert"])
def test_counts_carry_no_gradient(make_block: Make, name: str) -> None:
    """With counts held fixed each loss is linear in P, so scaling a token's affinity by its gradient gives it back."""
    devices = {"n_devices": 4} if name in ("device", "communication") else {}
    balance: Balance = make_block("balance", {"name": name, **devices}, n_experts=8, top_k=3)
    probs = PROBS.clone().requires_grad_()
    value = value_of(balance, probs)
    (gradient,) = torch.autograd.grad(value, probs)
    shifted = PROBS + 1e-4 * torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0])  # sums stay 1, choices stay
    near(value_of(balance, shifted), value.detach() + (gradient * (shifted - PROBS)).sum(), 0.0, 1e-7)
    assert not value_of(balance, PROBS).requires_grad


def test_a_device_with_two_of_a_tokens_experts_is_sent_it_once() -> None:
    balance, even = CommunicationBalance(4, 2, 2, 1, 1.0), torch.full((1, 4), 0.25)
    assert [value_of(balance, even, torch.tensor([pair])).item() for pair in ([0, 1], [0, 2])] == [1.0, 2.0]


def test_huggingface_convention_is_k_times_ours_at_even_routing_and_theirs_everywhere() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(3 * 21, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = logits.softmax(-1)
    ours = value_of(HFExpertBalance(1.0), *(t.unflatten(0, (3, 21)) for t in (probs, probs.topk(3).indices)))
    torch.testing.assert_close(ours, load_balancing_loss_func((logits,), 8, 3), check_dtype=False, rtol=1e-6, atol=0)
    even = torch.stack([(torch.arange(3) + t) % 8 for t in range(8)])
    assert value_of(HFExpertBalance(1.0), torch.full((8, 8), 0.125), even).item() == pytest.approx(3.0)
    assert value_of(ExpertBalance(8, 3, 1.0), torch.full((8, 8), 0.125), even).item() == pytest.approx(1.0)


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    value = RouterZLoss(0.5)(PROBS[None], GREEDY[None], LOGITS[None])["z_loss"]
    assert value.item() == pytest.approx(0.5 * (LOGITS.exp().sum(-1).log() ** 2).mean().item(), rel=1e-12)


def test_entries_of_no_expert_are_not_counted() -> None:
    idle = torch.tensor([[3, 0, 8], [2, 8, 8]])
    for balance in (ExpertBalance(8, 3, 1.0), DeviceBalance(8, 3, 4, 1.0), HFExpertBalance(1.0)):
        assert value_of(balance, experts=idle) < value_of(balance, experts=GREEDY)
    assert value_of(CommunicationBalance(8, 3, 4, 2, 1.0), experts=idle).isfinite()


def test_a_gate_reports_all_its_losses(make_block: Make) -> None:
    devices = [{"name": name, "n_devices": 4} for name in ("device", "communication")]
    node = {"name": "group_limited", "top_k": 3, "balance": [{"name": "expert"}, *devices, "z_loss"]}
    routing = make_block("gating", node, n_experts=8)(torch.randn(2, 9, 48, dtype=torch.float64))
    assert set(routing.losses) == {"expert_balance", "device_balance", "communication_balance", "z_loss"}
