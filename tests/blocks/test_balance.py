"""Balance losses against golden values and a gradient made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.balance.base import Balance
from blockwright.blocks.balance.communication import CommunicationBalance
from blockwright.blocks.balance.device import DeviceBalance
from blockwright.blocks.balance.expert import ExpertBalance
from blockwright.blocks.balance.hf_expert import HFExpertBalance
from blockwright.blocks.balance.z_loss import RouterZLoss
from blockwright.registry import ConfigError

LOGITS = torch.tensor(
    [[0.9, -0.3, 0.2, 1.1, -0.7, 0.4, 0.05, 0.6], [-0.2, 0.8, 1.3, -0.5, 0.1, 0.35, 0.9, -1.0]], dtype=torch.float64
)
GREEDY = torch.tensor([[3, 0, 7], [2, 6, 1]])
GROUP_LIMITED = torch.tensor([[3, 0, 2], [2, 6, 3]])


def loss(probs: Tensor, experts: Tensor, alpha: float = 1.0) -> Tensor:
    """Of sequences [B,T,·] or of one [T,·]."""
    probs, experts = (x if x.ndim == 3 else x[None] for x in (probs, experts))
    (value,) = ExpertBalance(probs.shape[-1], experts.shape[-1], alpha)(probs, experts, probs.log()).values()
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


# Gates without affinities, or with experts that every token has, which no loss balances.
OTHERS = "hash", "hash_softplus", "expert_choice", "sigmoid_sink"


@pytest.mark.parametrize("gate", [n for n in registry.names("gating") if n not in OTHERS])
def test_gate_hands_over_whole_affinities_and_the_choices_it_made(make_block: Callable[..., Any], gate: str) -> None:
    node = {"name": gate, "top_k": 3, "balance": {"name": "expert", "alpha": 0.25}}
    block, x = make_block("gating", node, n_experts=8), torch.randn(2, 9, 48, dtype=torch.float64)
    routing = block(x)
    probs, experts = routing.probs.unflatten(0, (2, 9)), routing.experts.unflatten(0, (2, 9))
    torch.testing.assert_close(routing.losses["expert_balance"], loss(probs, experts, 0.25), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", registry.names("balance"))
def test_every_balance_reports_named_scalars_with_a_gradient(make_block: Callable[..., Any], name: str) -> None:
    devices = {"n_devices": 4} if "n_devices" in registry.lookup("balance", name).schema.parameters else {}
    balance: Balance = make_block("balance", {"name": name, **devices}, n_experts=8, top_k=3)
    probs = LOGITS.softmax(-1)[None].requires_grad_()
    losses = balance(probs, GREEDY[None], probs)
    assert losses
    for value in losses.values():
        assert value.shape == () and value.isfinite()
        assert torch.autograd.grad(value, probs, retain_graph=True)[0].norm() > 0


# --- the other losses of DeepSeek-V2, Hugging Face's convention, the z-loss -------------------------------------------

PROBS = LOGITS.softmax(-1)[None]


def value_of(balance: Balance, probs: Tensor = PROBS, experts: Tensor = GROUP_LIMITED[None]) -> Tensor:
    (value,) = balance(probs, experts, probs.log()).values()
    return value


@pytest.mark.parametrize(
    ("balance", "golden"),
    [
        (ExpertBalance(8, 3, 1.0), 1.2713695277),
        (DeviceBalance(8, 3, 4, 1.0), 1.2276379371),
        (CommunicationBalance(8, 3, 4, 2, 1.0), 1.1601453266),
    ],
    ids=["expert", "device", "communication"],
)
def test_v2_losses_of_a_group_limited_choice_are_the_golden_ones(balance: Balance, golden: float) -> None:
    assert value_of(balance).item() == pytest.approx(golden, rel=1e-9)
    balance.alpha = 0.05
    assert value_of(balance).item() == pytest.approx(0.05 * golden, rel=1e-9)


@pytest.mark.parametrize("name", ["expert", "device", "communication", "hf_expert"])
def test_counts_carry_no_gradient(make_block: Callable[..., Any], name: str) -> None:
    """With counts held fixed each loss is linear in P, so scaling a token's affinity by its gradient gives it back."""
    devices = {"n_devices": 4} if name in ("device", "communication") else {}
    balance: Balance = make_block("balance", {"name": name, **devices}, n_experts=8, top_k=3)
    probs = PROBS.clone().requires_grad_()
    value = value_of(balance, probs)
    (gradient,) = torch.autograd.grad(value, probs)
    shifted = PROBS + 1e-4 * torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0])  # sums stay 1, choices stay
    expected = value.detach() + (gradient * (shifted - PROBS)).sum()
    torch.testing.assert_close(value_of(balance, shifted), expected, rtol=1e-7, atol=0)
    assert not value_of(balance, PROBS).requires_grad


def test_a_device_with_two_of_a_tokens_experts_is_sent_it_once() -> None:
    both, apart = torch.tensor([[[0, 1]]]), torch.tensor([[[0, 2]]])
    balance = CommunicationBalance(4, 2, 2, 1, 1.0)
    even = torch.full((1, 1, 4), 0.25)
    assert (value_of(balance, even, both).item(), value_of(balance, even, apart).item()) == (1.0, 2.0)


def test_huggingface_convention_is_k_times_ours_at_even_routing_and_theirs_everywhere() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(3 * 21, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = logits.softmax(-1)
    experts = probs.topk(3).indices
    theirs = load_balancing_loss_func((logits,), 8, 3)
    ours = value_of(HFExpertBalance(1.0), probs.unflatten(0, (3, 21)), experts.unflatten(0, (3, 21)))
    torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-6, atol=0)
    even = torch.stack([(torch.arange(3) + t) % 8 for t in range(8)])[None]
    assert value_of(HFExpertBalance(1.0), torch.full((1, 8, 8), 0.125), even).item() == pytest.approx(3.0)
    assert value_of(ExpertBalance(8, 3, 1.0), torch.full((1, 8, 8), 0.125), even).item() == pytest.approx(1.0)


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    value = RouterZLoss(0.5)(PROBS, GREEDY[None], LOGITS[None])["z_loss"]
    assert value.item() == pytest.approx(0.5 * (LOGITS.exp().sum(-1).log() ** 2).mean().item(), rel=1e-12)


def test_entries_of_no_expert_are_not_counted() -> None:
    idle = torch.tensor([[[3, 0, 8], [2, 8, 8]]])
    for balance in (ExpertBalance(8, 3, 1.0), DeviceBalance(8, 3, 4, 1.0), HFExpertBalance(1.0)):
        assert value_of(balance, experts=idle) < value_of(balance, experts=GREEDY[None])
    assert value_of(CommunicationBalance(8, 3, 4, 2, 1.0), experts=idle).isfinite()


def test_a_gate_reports_all_its_losses(make_block: Callable[..., Any]) -> None:
    losses = [
        {"name": "expert"},
        {"name": "device", "n_devices": 4},
        {"name": "communication", "n_devices": 4},
        "z_loss",
    ]
    gate = make_block("gating", {"name": "group_limited", "top_k": 3, "balance": losses}, n_experts=8)
    routing = gate(torch.randn(2, 9, 48, dtype=torch.float64))
    assert set(routing.losses) == {"expert_balance", "device_balance", "communication_balance", "z_loss"}


@pytest.mark.parametrize("n_devices", [0, 3, 16])
@pytest.mark.parametrize("name", ["device", "communication"])
def test_devices_that_cannot_share_the_experts_are_refused(
    make_block: Callable[..., Any], name: str, n_devices: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_block("balance", {"name": name, "n_devices": n_devices}, n_experts=8, top_k=2)
    assert caught.value.path == "model.balance.n_devices"


def test_path_of_a_loss_in_a_list_says_which_one(make_block: Callable[..., Any]) -> None:
    node = {"name": "softmax_topk", "balance": ["expert", {"name": "z_loss", "alfa": 1.0}]}
    with pytest.raises(ConfigError, match="alpha") as caught:
        make_block("gating", node, n_experts=8)
    assert caught.value.path == "model.gating.balance.1.alfa"
