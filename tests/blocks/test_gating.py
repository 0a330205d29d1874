"""Gates against golden vectors (E = 8, four groups of two, two kept, k = 3), and what every gate promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.gating.base import Gating, LinearGating, keep_groups, replays, rows
from blockwright.blocks.gating.biased import balanced
from blockwright.registry import BlockError, ConfigError
from tests.blocks.small import Make, near

GATES = registry.names("gating")
LEARNED = [n for n in GATES if "balance" in registry.lookup("gating", n).schema.parameters]  # of the others, hash
CAUSAL = [n for n in LEARNED if registry.lookup("gating", n).cls.causal]
HASHED = ["hash", "hash_softplus"]
REPLAYED = [n for n in GATES if n not in ("expert_choice", "expert_threshold", "sinkhorn", *HASHED)]
LOGITS = torch.tensor(
    [[0.9, -0.3, 0.2, 1.1, -0.7, 0.4, 0.05, 0.6], [-0.2, 0.8, 1.3, -0.5, 0.1, 0.35, 0.9, -1.0]], dtype=torch.float64
)
BIAS = torch.tensor([0, 0.2, -0.1, 0, 0.3, 0, 0, 0.1])
GROUPED = {"n_groups": 4, "top_groups": 2}
GOLDEN: dict[str, tuple[dict[str, Any], list[list[int]], list[list[float]]]] = {
    "greedy": (
        {"name": "softmax_topk"},
        [[3, 0, 7], [2, 6, 1]],
        [[0.244484, 0.200166, 0.148287], [0.289564, 0.194100, 0.175629]],
    ),
    "group limited": (
        {"name": "group_limited", **GROUPED, "scaling": 16.0},
        [[3, 0, 2], [2, 6, 3]],
        [[3.911741, 3.202663, 1.590395], [4.633016, 3.105604, 0.765832]],
    ),
    "sigmoid with a bias": (
        {"name": "sigmoid_bias", **GROUPED, "scaling": 2.5},
        [[7, 0, 1], [1, 4, 5]],
        [[0.905720, 0.997313, 0.596968], [0.957462, 0.728502, 0.814036]],
    ),
    "softmax with a bias": (
        {"name": "softmax_bias", "renormalise": False, "scaling": 2.0},
        [[4, 1, 7], [4, 1, 6]],
        [[0.080826, 0.120578, 0.296574], [0.174430, 0.351258, 0.388200]],
    ),
}


@pytest.fixture
def make(make_block: Make) -> Make:
    def build(node: Any, n_experts: int = 8, dtype: torch.dtype = torch.float32, **changes: Any) -> Gating:
        node = {"name": node} if isinstance(node, str) else node
        return make_block("gating", {**node, **changes}, n_experts=n_experts, dtype=dtype)

    return build


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", GOLDEN)
def test_choices_and_weights_are_the_golden_ones(make: Make, case: str) -> None:
    node, experts, weights = GOLDEN[case]
    gate = make(node, top_k=3)
    if "bias" in case:
        gate.bias.copy_(BIAS)
    chosen, weighed, probs = gate.choose(LOGITS)
    assert chosen.tolist() == experts
    near(weighed, torch.tensor(weights, dtype=torch.float64), 1e-6)
    near(probs, LOGITS.sigmoid() if "sigmoid" in case else LOGITS.softmax(-1), 1e-15)  # before any bias or mask


def test_weights_are_numbers_where_every_affinity_vanishes(make: Make) -> None:
    """exp(−200) is 0 in fp32, and so is the sum that renormalised weights are divided by."""
    for name in LEARNED:
        settings = registry.lookup("gating", name).schema.parameters
        gate = make(name, **({"renormalise": True} if "renormalise" in settings else {})).requires_grad_(False)
        gate.weight.fill_(-200 / 48)
        assert gate(torch.ones(1, 3, 48)).weights.isfinite().all(), name


def test_softmax_over_the_chosen_logits_renormalised_or_times_gains(make: Make) -> None:
    for node in ({"name": "softmax_topk", "renormalise": True, "scaling": 1.5}, {"name": "normed_softmax"}):
        gate = make(node, top_k=3)
        chosen, weights, probs = gate.choose(LOGITS)
        gains = gate.gain.double()[chosen] if node["name"] == "normed_softmax" else 1.5
        near(weights, gains * LOGITS.gather(1, chosen).softmax(-1))
        assert torch.equal(chosen, probs.topk(3).indices)
    one, other = (
        make(n, top_k=3).choose(LOGITS) for n in ("topk_softmax", {"name": "softmax_topk", "renormalise": True})
    )
    near(one, other)


@pytest.mark.parametrize("name", ["sigmoid_bias", "softplus_bias"])
def test_bias_sways_the_choice_and_not_the_weight_which_need_not_be_renormalised(make: Make, name: str) -> None:
    gate = make(name, top_k=3, renormalise=False, scaling=2.0)
    affinities = LOGITS.sigmoid() if name == "sigmoid_bias" else (1 + LOGITS.exp()).log().sqrt()
    for bias in (BIAS, torch.tensor([0.0, 0, 0, 0, 10, 0, 0, 0])):
        gate.bias.copy_(bias)
        chosen, weights, _ = gate.choose(LOGITS)
        near(weights, 2 * affinities.gather(1, chosen))
        assert torch.equal(chosen, (affinities + bias).topk(3).indices)


def test_groups_are_neighbours_and_the_best_ones_stay_to_be_renormalised_and_scaled(make: Make) -> None:
    kept = keep_groups(torch.arange(12.0)[None], torch.tensor([[5.0, 1.0, 7.0, 6.0]]), 2)
    assert kept.isfinite().nonzero()[:, 1].tolist() == [6, 7, 8, 9, 10, 11]
    limited, free = (
        make(n, top_k=3, **g) for n, g in (("group_limited", {"n_groups": 1, "top_groups": 1}), ("softmax_topk", {}))
    )
    assert all(map(torch.equal, limited.choose(LOGITS), free.choose(LOGITS)))  # one group is no limit
    alone = make("sigmoid_bias", top_k=2, n_groups=8, top_groups=2)  # a group of one expert is scored by it alone
    assert alone.choose(LOGITS)[0].tolist() == [[3, 0], [2, 6]]
    plain = make("group_limited", top_k=3, **GROUPED).choose(LOGITS)[1]
    weights = make("group_limited", renormalise=True, scaling=2.5, top_k=3, **GROUPED).choose(LOGITS)[1]
    near(weights, 2.5 * plain / plain.sum(-1, keepdim=True))


def test_experts_outside_the_kept_groups_lose_even_to_negative_scores_unless_masked_with_zero(make: Make) -> None:
    """Filled with 0, as in DeepSeek's Hugging Face code, they beat the kept group's own −0.45 and −0.46."""
    s = torch.tensor([[0.9, 0.8, 0.05, 0.04, 0.3, 0.29, 0.28, 0.27]], dtype=torch.float64)
    chosen = []
    for masked in ({}, {"masked": "zero"}):
        gate = make("sigmoid_bias", top_k=3, n_groups=2, top_groups=1, **masked)
        gate.bias.copy_(torch.tensor([0, 0, -0.5, -0.5, 0, 0, 0, 0]))
        chosen.append(gate.choose(s.logit())[0][0].tolist())
    assert chosen[0] == [0, 1, 2] and {0, 1} < set(chosen[1]) and set(chosen[1]) & {4, 5, 6, 7}


def test_router_bias_is_added_to_the_logits(make: Make) -> None:
    gate, x = make("topk_softmax", top_k=3, bias=True), tokens(1, 7)
    assert torch.equal(gate(x).experts, (x[0] @ gate.weight.t() + gate.logit_bias).topk(3).indices)
    assert make("topk_softmax").logit_bias is None


@pytest.mark.parametrize("name", REPLAYED)
def test_experts_of_an_earlier_routing_are_weighed_not_chosen(make: Make, name: str) -> None:
    gate, x = make(name, top_k=2), tokens(3, 5)
    live, other = gate(x), gate(tokens(3, 5, seed=1)).experts
    again = gate(x, None, live.experts)
    assert torch.equal(again.weights, live.weights) and torch.equal(again.probs, live.probs)
    forced = gate(x, None, torch.where(torch.arange(15)[:, None] < 9, other, -1))
    assert torch.equal(forced.experts[:9], other[:9]) and torch.equal(forced.experts[9:], live.experts[9:])
    assert not torch.equal(other[:9], live.experts[:9]) and forced.weights.isfinite().all()
    forced.weights[:9].sum().backward()
    assert gate.weight.grad.isfinite().all() and forced.load.sum() == 30
    own = torch.arange(8).repeat(15, 1)[:, :2].flip(1)  # in the given order
    assert torch.equal(gate(x, None, own).weights, gate(x, None, own.flip(1)).weights.flip(1))


def test_gates_say_whether_a_routing_can_be_replayed(make: Make) -> None:
    class Old(LinearGating):
        def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            raise NotImplementedError

    assert not replays(Old(4, 2, 1, None)) and not replays(make("sinkhorn"))
    assert all(replays(make(name)) for name in [*REPLAYED, *HASHED])


@pytest.mark.parametrize("name", LEARNED)
def test_routers_learn_in_single_precision_in_any_model_and_shape(make: Make, name: str) -> None:
    gate, x = make(name), tokens(2, 63)
    plain = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, plain[:3], gate(x)[:3]))
    half, single = (make(name, dtype=torch.bfloat16) for _ in range(2))
    single.weight.data = single.weight.data.float()
    assert all(map(torch.equal, half(x.bfloat16())[:3], single(x.bfloat16().float())[:3]))
    x = tokens(1, 63).requires_grad_()
    routing = gate(x)
    (routing.weights * torch.randn_like(routing.weights)).sum().backward()
    assert gate.weight.grad.isfinite().all() and (gate.weight.grad.norm(dim=1) > 0).all() and x.grad.norm() > 0
    assert routing.losses == {}  # without balance
    if name in CAUSAL:
        gate = make(name, balance={"name": "expert"})
        batched, flat, alone = gate(x), gate(x[0]), gate(x[:, 17:18])
        assert all(map(torch.equal, batched[:3], flat[:3])) and batched.losses == flat.losses
        assert torch.equal(alone.experts[0], batched.experts[17])


def test_all_experts_at_once_is_a_choice_too_and_an_update_leaves_gates_without_state_alone(make: Make) -> None:
    for name in GATES:
        grouped = "n_groups" in registry.lookup("gating", name).schema.parameters
        gate = make(name, top_k=8, **({"n_groups": 1, "top_groups": 1} if grouped else {}))
        gate.reset_parameters()
        assert gate(tokens(1, 5), torch.arange(5)[None]).load.tolist() == [5.0] * 8, name
        before = {k: v.clone() for k, v in gate.state_dict().items()}
        seen = gate.train()(tokens(1, 5), torch.arange(5)[None]).seen
        gate.update(torch.arange(8.0) if seen is None else seen)
        same = all(torch.equal(v, before[k]) for k, v in gate.state_dict().items())
        assert same != name.endswith(("_bias", "_sink", "_threshold")), name


def test_bias_moves_by_its_update_alone_one_step_against_the_load(make: Make) -> None:
    gate = make("sigmoid_bias", bias_step=0.25).train()
    gate.bias.copy_(BIAS)
    for _ in range(3):
        gate(tokens(2, 63)).weights.sum().backward()
    assert torch.equal(gate.bias, BIAS) and gate.bias.grad is None and not gate.bias.requires_grad
    assert "bias" not in dict(gate.named_parameters()) and "bias" in gate.state_dict()
    gate.update(torch.tensor([10.0, 0, 4, 3, 5, 4, 4, 2]))
    assert torch.equal(gate.bias, BIAS + 0.25 * torch.tensor([-1.0, 1, 0, 1, -1, 0, 0, 1]))


def test_updates_even_out_the_load(make: Make) -> None:
    gate, x = make("sigmoid_bias", bias_step=0.01), tokens(4, 63) + 0.5 * tokens(seed=9)
    before = gate(x).load
    assert before.max() > 2 * before.mean()
    for _ in range(150):
        gate.update(gate(x).load)
    assert gate(x).load.max() < 1.3 * before.mean()


def test_a_bias_that_is_solved_for_is_the_quantile_of_the_margins_of_a_step(make: Make) -> None:
    """Whatever its micro-batches; padding is in none of them."""
    gate, real = make("sigmoid_quantile", top_k=3), torch.arange(63).expand(4, -1) < 50
    gate.bias.copy_(BIAS)
    x = tokens(4, 63) + 0.5 * tokens(seed=9)
    scores = gate(x).probs[real.flatten()]
    margins = (scores + BIAS).topk(4).values[:, -1:] - scores
    counted = sum(gate(x[i : i + 1], real=real[i : i + 1]).counted for i in range(4))
    assert counted.sum(1).tolist() == [200] * 8 and gate.eval()(x).seen is None
    gate.update(counted)
    right = margins.quantile(3 / 8, 0)
    near(gate.bias, right - right.mean(), 4e-3)
    assert counted.shape == (8, 1000) and gate(x[real][None]).load.max() < 1.2 * 75
    before = gate.bias.clone()
    gate.update(torch.zeros(8, 1000))
    assert torch.equal(gate.bias, before)


def test_one_step_evens_out_the_load_where_the_sign_of_it_takes_many(make: Make) -> None:
    gate, x = make("sigmoid_quantile").train(), tokens(4, 63) + 0.5 * tokens(seed=9)
    before = gate(x).load
    assert before.max() > 2 * before.mean()
    for _ in range(3):
        gate.update(gate(x).counted)
    assert gate(x).load.max() < 1.1 * before.mean()


def test_experts_take_what_is_above_their_threshold_which_evens_out_the_load(make: Make) -> None:
    gate, x = make("expert_threshold", top_k=2, most=6).train(), tokens(4, 63) + 0.5 * tokens(seed=9)
    for _ in range(3):
        gate.update(gate(x).counted)
    routing, scores = gate(x), gate(x).probs
    assert torch.allclose(gate.threshold, scores.quantile(1 - 2 / 8, 0), atol=5e-3)
    above = scores > gate.threshold
    number = (routing.experts < 8).sum(1)
    assert torch.equal(number, above.sum(1).clamp(max=6)) and len(number.unique()) > 2
    assert routing.load.max() < 1.1 * routing.load.mean() and 55 < routing.load.mean() <= 64
    near(routing.weights, scores.gather(1, routing.experts.clamp(max=7)) * (routing.experts < 8))
    one = gate.eval()(x[:1, :9])  # no choice sees another token
    assert torch.equal(one.experts, routing.experts[:9])
    with pytest.raises(ConfigError, match="most"):
        make("expert_threshold", top_k=3, most=2)


def test_a_gate_that_solves_for_its_bias_chooses_and_weighs_as_one_that_steps(make: Make) -> None:
    found = []
    for name in ("sigmoid_bias", "sigmoid_quantile"):
        gate = make(name, top_k=3, scaling=2.5)
        gate.bias.copy_(BIAS)
        found.append(gate.choose(LOGITS))
    assert all(map(torch.equal, *found))


def test_bias_of_a_gate_with_shared_experts_follows_the_routed_ones(make: Make) -> None:
    gate = make("sigmoid_sink", top_k=4, n_shared=2, bias_step=0.5)
    routing = gate(tokens(2, 31))
    assert routing.experts.shape[1] == 4 and bool((routing.experts[:, 2:] == torch.tensor([6, 7])).all())
    torch.testing.assert_close(routing.weights.sum(1), gate.gain.float().expand(62))
    gate.update(torch.tensor([9.0, 1, 1, 1, 1, 5, 99, 99]))  # the mean of the first six is 3
    assert gate.bias.tolist() == [-0.5, 0.5, 0.5, 0.5, 0.5, -0.5]


def test_bias_keeps_its_precision_in_a_model_of_half(make: Make) -> None:
    """In bf16 a step of 0.001 is lost beside a bias of 0.5, and the balancing would stop."""
    gate = make("sigmoid_bias")
    gate.bias.copy_(torch.arange(8) / 7)
    gate = gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16 and torch.equal(gate.bias, torch.arange(8) / 7)
    for _ in range(1000):
        gate.update(torch.tensor([0.0] + [1.0] * 7))
    assert gate.bias[0].item() == pytest.approx(1.0, abs=1e-4) and gate.to("meta").bias.is_meta


def test_bias_rests_after_its_steps_and_a_checkpoint_remembers_them(make: Make) -> None:
    load, (gate, resumed) = (
        torch.tensor([1.0] + [0.0] * 7),
        (make("sigmoid_bias", bias_step=0.5, bias_until=2) for _ in "ab"),
    )
    gate.update(load)
    resumed.load_state_dict(gate.state_dict())
    for _ in range(3):
        resumed.update(load)
    assert resumed.bias.tolist() == [-1.0] + [1.0] * 7


@pytest.mark.parametrize(("n_tokens", "top_k"), [(63, 2), (64, 3), (5, 1), (3, 8)])
def test_each_expert_chooses_as_many_tokens_of_highest_affinity(make: Make, n_tokens: int, top_k: int) -> None:
    routing = make("expert_choice", top_k=top_k)(tokens(1, n_tokens))
    capacity = min(n_tokens, max(1, n_tokens * top_k // 8))
    assert routing.load.tolist() == [float(capacity)] * 8
    assert routing.pairs == capacity * 8 == int((routing.experts < 8).sum())
    assert (routing.weights[routing.experts == 8] == 0).all()
    for e in range(8):
        best = routing.probs[:, e].topk(capacity).indices
        assert set((routing.experts[:, e] == e).nonzero()[:, 0].tolist()) == set(best.tolist())
        assert torch.equal(routing.weights[best, e], routing.probs[best, e])
    choices = torch.tensor([[0, 7], [8, 1]])  # of no expert: left out where counting is free
    assert rows(choices, 8, 4) == 3 and rows(choices.to("meta"), 8, 4) == 4


def test_sinkhorn_evens_out_what_top_k_would_pile_up_and_evaluates_one_token_at_a_time(make: Make) -> None:
    gate, x = make("sinkhorn", top_k=1, iterations=50), tokens(4, 63) + 0.5 * tokens(seed=9)
    even, piled = gate(x).load, gate.eval()(x).load
    assert even.max() < 1.3 * even.mean() and piled.max() > 2 * piled.mean()
    scaled = balanced(LOGITS.repeat(4, 1) + torch.randn(8, 8, dtype=torch.float64), 200).exp()
    for dim in (0, 1):
        near(scaled.sum(dim).double(), (scaled.sum() / 8).double().expand(8), 0, 1e-6)
    gate, x = make("sinkhorn", top_k=2).eval(), tokens(1, 21)
    assert torch.equal(gate(x).experts[3:4], gate(x[:, 3:4]).experts)
    assert torch.equal(gate(x).weights, gate(x).probs.gather(1, gate(x).experts))


def test_hash_depends_on_the_tokens_id_alone(make: Make) -> None:
    gate, ids = make("hash", top_k=3), torch.arange(61)[None]
    gate.reset_parameters()
    routing, again = gate(tokens(1, 61), ids), gate(tokens(1, 61, seed=1), ids)
    assert torch.equal(routing.experts, again.experts) and (routing.weights == 1 / 3).all()
    assert all(len(set(row)) == 3 for row in routing.experts.tolist())
    assert len({tuple(row) for row in routing.experts.tolist()}) > 30
    for name in HASHED:
        with pytest.raises(BlockError, match="ids"):
            make(name)(tokens(1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_weights_of_a_hash_are_those_of_deepseek_v4(make: Make, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    gate, x, ids = make("hash_softplus", top_k=3, scaling=1.5).to(dtype), tokens(2, 5).to(dtype), torch.arange(10) * 6
    config = transformers.DeepseekV4Config(
        num_experts_per_tok=3, num_local_experts=8, hidden_size=x.shape[-1], vocab_size=61, routed_scaling_factor=1.5
    )
    theirs = transformers.DeepseekV4HashRouter(config).to(dtype)
    theirs.weight.data.copy_(gate.weight)
    theirs.tid2eid.copy_(gate.table)
    found, (_, weights, experts) = gate(x, ids.view(2, 5)), theirs(x, ids.view(2, 5))
    assert torch.equal(found.experts, experts)
    near(found.weights.to(dtype), weights, 1e-6)  # the router is in fp32
    found.weights[:, 0].sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad.any()
