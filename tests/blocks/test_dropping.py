"""Dropping tokens from overloaded devices, against a plain reading of the rule."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from blockwright.blocks import dropping
from blockwright.blocks.dropping import DeviceBudget
from blockwright.blocks.gating.base import Routing, count, rows
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.precision import default_dtype
from tests.blocks.small import Make, drawn, near

B, T, E, K, DEVICES = 4, 21, 8, 2, 4


def routed(seed: int = 0) -> Routing:
    """A lopsided routing: the first experts are chosen most."""
    logits = torch.randn(B * T, E, generator=torch.Generator().manual_seed(seed)) - torch.arange(E) * 0.4
    probs = logits.softmax(-1)
    weights, experts = probs.topk(K)
    return Routing(experts, weights, probs, {}, count(experts, E))


def by_hand(routing: Routing, whole: Tensor, budget: int) -> set[tuple[int, int]]:
    """The pairs that stay: on each device, exempt ones, then by falling affinity until the budget is used."""
    kept: set[tuple[int, int]] = set()
    for device in range(DEVICES):
        pairs = [
            (not bool(whole[t]), -float(routing.probs[t, e]), t, j)
            for t, row in enumerate(routing.experts.tolist())
            for j, e in enumerate(row)
            if e // (E // DEVICES) == device
        ]
        pairs.sort()
        kept |= {(t, j) for i, (mortal, _, t, j) in enumerate(pairs) if i < budget or not mortal}
    return kept


@pytest.mark.parametrize(("capacity", "exempt"), [(1.0, 0), (0.5, 1), (1.25, 2), (0.5, 2)])
def test_each_device_keeps_its_budget_of_the_highest_affinities(capacity: float, exempt: int) -> None:
    routing, whole = routed(), (torch.arange(B) < exempt).repeat_interleave(T)
    kept = DeviceBudget(E, DEVICES, capacity).within_budget(routing, whole)
    budget = -int(-capacity * B * T * K // DEVICES)
    assert {tuple(p) for p in kept.nonzero().tolist()} == by_hand(routing, whole, budget)
    assert not kept.all()


def test_budget_is_of_the_pairs_that_are_real() -> None:
    """Experts that choose leave most entries empty; these are no load."""
    routing = routed()
    taken = torch.arange(B * T * E).view(B * T, E) % 4 == 0
    chosen = torch.where(taken, torch.arange(E), E)
    sparse = routing._replace(experts=chosen, weights=routing.probs * taken, pairs=int(taken.sum()))
    kept = DeviceBudget(E, DEVICES, 0.5, exempt=0.0)(sparse, (B, T))
    devices = kept.experts[kept.experts < E] // (E // DEVICES)
    assert torch.bincount(devices).max() == -int(-0.5 * int(taken.sum()) // DEVICES)


@pytest.mark.parametrize(("n_pairs", "n_devices"), [(21, 7), (1028, 4), (1025, 1)])
def test_budget_is_counted_exactly_under_any_default_dtype(n_pairs: int, n_devices: int) -> None:
    experts, probs = torch.zeros(n_pairs, 1, dtype=torch.int64), torch.full((n_pairs, n_devices), 0.5)
    routing = Routing(experts, probs[:, :1], probs, {}, count(experts, n_devices))
    for dtype in (torch.float32, torch.bfloat16):
        with default_dtype(dtype):
            kept = DeviceBudget(n_devices, n_devices).within_budget(routing, torch.zeros(n_pairs, dtype=torch.bool))
        assert int(kept.sum()) == -(-n_pairs // n_devices)


def test_dropped_pairs_have_no_expert_and_no_weight() -> None:
    routing = routed()
    kept = DeviceBudget(E, DEVICES, 1.0, exempt=0.0)(routing, (B, T))
    gone = kept.experts == E
    assert gone.any() and (kept.weights[gone] == 0).all() and kept.pairs == int((~gone).sum())
    assert torch.equal(kept.experts[~gone], routing.experts[~gone])
    assert torch.equal(kept.weights[~gone], routing.weights[~gone])


def test_sequences_that_are_exempt_are_kept_whole_and_drawn_anew() -> None:
    routing, drop = routed(), DeviceBudget(E, DEVICES, 0.1, exempt=0.5)
    torch.manual_seed(0)
    kept = [(drop(routing, (B, T)).experts < E).view(B, T * K).all(1) for _ in range(20)]
    assert 0.3 < torch.stack(kept).float().mean() < 0.7 and len({tuple(k.tolist()) for k in kept}) > 3
    assert drop.eval()(routing, (B, T)) is routing  # evaluation drops nothing


def test_moe_leaves_dropped_tokens_to_the_shared_experts(make_block: Make) -> None:
    around = {"gating": {"name": "softmax_topk", "top_k": 2}, "experts": {"name": "swiglu", "d_ff": 12}}
    drop = {"name": "device_budget", "n_devices": 4, "capacity": 1e-9, "exempt": 0.0}
    moe = make_block("ffn", {"name": "moe", "n_experts": 8, "shared": "swiglu", "dropping": drop}, around=around)
    x = drawn(2, 21, 48)
    y, routing = moe(x)
    all_gone = (routing.experts == 8).all(1)
    assert all_gone.sum() >= 42 - 4  # a budget of one a device
    assert torch.equal(y.flatten(0, 1)[all_gone], moe.shared(x)[0].flatten(0, 1)[all_gone])
    y.sum().backward()
    assert moe.experts.down.grad.isfinite().all() and moe.gating.weight.grad.norm() > 0
    whole, _ = moe.eval()(x)
    assert (whole - y).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kernel", "experts", "gating"),
    pairs(["segments", "grouped", "loop"], ["swiglu", "clamped_swiglu"], ["softmax_topk", "expert_choice"]),
)
def test_rows_that_are_not_counted_change_nothing(
    make_block: Make, monkeypatch: pytest.MonkeyPatch, gating: str, experts: str, kernel: str
) -> None:
    """On a GPU, dropped pairs are computed with weight 0 rather than counted."""
    around = {"gating": {"name": gating, "top_k": 2}, "experts": {"name": experts, "d_ff": 12}}
    drop = {"name": "device_budget", "n_devices": 4, "capacity": 0.5}
    moe = make_block("ffn", {"name": "moe", "n_experts": 8, "dropping": drop}, around=around)
    moe.experts.kernels = Kernels(experts=kernel)
    x, sides, computed = drawn(2, 21, 48).requires_grad_(), [], []
    for counted in (True, False):
        if not counted:
            monkeypatch.setattr(dropping, "rows", lambda experts, n_experts, most: most)
        torch.manual_seed(0)
        y, routing = moe(x)
        computed.append(routing.experts.numel() if routing.pairs is None else routing.pairs)
        sides.append([y, *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])])
    assert computed[0] < computed[1] and (routing.experts == 8).any()
    near(*sides, 1e-12, 1e-10)


def test_a_gpu_is_not_waited_for_and_a_compiler_makes_one_graph() -> None:
    drop = DeviceBudget(E, DEVICES)
    with FakeTensorMode():
        there = torch.zeros(B * T, K, dtype=torch.int64, device="cuda")
        assert [rows(there, 8, n) for n in (None, 99)] == [None, 99]
    graph = torch.compile(drop, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    compiled = graph(routed(), (B, T))
    torch.manual_seed(0)
    assert torch.equal(compiled.experts, drop(routed(), (B, T)).experts) and compiled.pairs is None
