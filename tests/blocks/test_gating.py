"""Gates against golden vectors (E = 8, four groups of two, two kept, k = 3), and what every gate promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.gating.base import Gating, LinearGating, keep_groups, replays, rows
from blockwright.blocks.gating.sinkhorn import balanced
from blockwright.registry import BlockError, ConfigError

GATES = registry.names("gating")
LEARNED = [n for n in GATES if "balance" in registry.lookup("gating", n).schema.parameters]  # of the others, hash
CAUSAL = [n for n in LEARNED if registry.lookup("gating", n).cls.causal]  # type: ignore[attr-defined]
BY_TOKEN = [n for n in GATES if n != "expert_choice"]  # tokens choose: k experts each
LOGITS = torch.tensor(
    [[0.9, -0.3, 0.2, 1.1, -0.7, 0.4, 0.05, 0.6], [-0.2, 0.8, 1.3, -0.5, 0.1, 0.35, 0.9, -1.0]], dtype=torch.float64
)
GOLDEN: dict[str, tuple[dict[str, Any], list[list[int]], list[list[float]]]] = {
    "greedy": (
        {"name": "softmax_topk"},
        [[3, 0, 7], [2, 6, 1]],
        [[0.244484, 0.200166, 0.148287], [0.289564, 0.194100, 0.175629]],
    ),
    "group limited": (
        {"name": "group_limited", "n_groups": 4, "top_groups": 2, "scaling": 16.0},
        [[3, 0, 2], [2, 6, 3]],
        [[3.911741, 3.202663, 1.590395], [4.633016, 3.105604, 0.765832]],
    ),
    "sigmoid with a bias": (
        {"name": "sigmoid_bias", "n_groups": 4, "top_groups": 2, "scaling": 2.5},
        [[7, 0, 1], [1, 4, 5]],
        [[0.905720, 0.997313, 0.596968], [0.957462, 0.728502, 0.814036]],
    ),
    "softmax with a bias": (
        {"name": "softmax_bias", "renormalise": False, "scaling": 2.0},
        [[4, 1, 7], [4, 1, 6]],
        [[0.080826, 0.120578, 0.296574], [0.174430, 0.351258, 0.388200]],
    ),
}
BIAS = torch.tensor([0, 0.2, -0.1, 0, 0.3, 0, 0, 0.1])


@pytest.fixture(scope="module")
def make(make_block: Callable[..., Any]) -> Callable[..., Gating]:
    def build(
        node: dict[str, Any] | str, n_experts: int = 8, dtype: torch.dtype = torch.float32, **node_changes: Any
    ) -> Gating:
        node = {"name": node} if isinstance(node, str) else node
        return make_block("gating", {**node, **node_changes}, n_experts=n_experts, dtype=dtype)

    return build


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(seed))


# --- golden vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_choices_and_weights_are_the_golden_ones(make: Callable[..., Gating], case: str) -> None:
    node, experts, weights = GOLDEN[case]
    gate = make(node, top_k=3)
    if "bias" in case:
        gate.bias.copy_(BIAS)
    chosen, weighed, probs = gate.choose(LOGITS)
    assert chosen.tolist() == experts
    torch.testing.assert_close(weighed, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-6)
    expected = LOGITS.sigmoid() if "sigmoid" in case else LOGITS.softmax(-1)
    torch.testing.assert_close(probs, expected, rtol=0, atol=1e-15)  # before any bias or mask


HASHED = ("hash", "hash_softplus")
REPLAYED = [n for n in BY_TOKEN if n not in ("sinkhorn", *HASHED)]


@pytest.mark.parametrize("name", REPLAYED)
def test_experts_of_an_earlier_routing_are_weighed_not_chosen(make: Callable[..., Gating], name: str) -> None:
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
    renormalised = gate(x, None, own).weights
    assert torch.equal(renormalised, gate(x, None, own.flip(1)).weights.flip(1))


def test_gates_say_whether_a_routing_can_be_replayed(make: Callable[..., Gating]) -> None:
    class Old(LinearGating):
        def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
            raise NotImplementedError

    assert not replays(Old(4, 2, 1, None)) and not replays(make("sinkhorn"))
    assert all(replays(make(name)) for name in [*REPLAYED, *HASHED])


def test_renormalised_softmax_is_a_softmax_over_the_chosen_logits(make: Callable[..., Gating]) -> None:
    chosen, weights, _ = make("softmax_topk", top_k=3, renormalise=True, scaling=1.5).choose(LOGITS)
    torch.testing.assert_close(weights, 1.5 * LOGITS.gather(1, chosen).softmax(-1), rtol=0, atol=1e-12)


def test_normed_softmax_is_a_softmax_over_the_chosen_logits_times_gains(make: Callable[..., Gating]) -> None:
    gate = make("normed_softmax", top_k=3)
    chosen, weights, probs = gate.choose(LOGITS)
    expected = gate.gain.double()[chosen] * LOGITS.gather(1, chosen).softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    assert torch.equal(chosen, probs.topk(3).indices)


def test_choices_of_no_expert_are_left_out_where_counting_is_free() -> None:
    choices = torch.tensor([[0, 7], [8, 1]])
    assert rows(choices, 8, 4) == 3 and rows(choices.to("meta"), 8, 4) == 4


@pytest.mark.parametrize("name", ["sigmoid_bias", "softplus_bias"])
def test_weights_without_the_bias_need_not_be_renormalised(make: Callable[..., Gating], name: str) -> None:
    gate = make(name, top_k=3, renormalise=False, scaling=2.0)
    gate.bias.copy_(BIAS)
    chosen, weights, _ = gate.choose(LOGITS)
    affinities = LOGITS.sigmoid() if name == "sigmoid_bias" else (1 + LOGITS.exp()).log().sqrt()
    torch.testing.assert_close(weights, 2 * affinities.gather(1, chosen), rtol=0, atol=1e-12)
    assert torch.equal(chosen, (affinities + BIAS).topk(3).indices)


def test_one_group_is_no_group_limit(make: Callable[..., Gating]) -> None:
    limited = make("group_limited", top_k=3, n_groups=1, top_groups=1).choose(LOGITS)
    free = make("softmax_topk", top_k=3).choose(LOGITS)
    assert all(torch.equal(a, b) for a, b in zip(limited, free, strict=True))


def test_experts_outside_the_kept_groups_lose_even_to_negative_scores(make: Callable[..., Gating]) -> None:
    """Masked with −inf: filled with 0, expert 7 would beat the kept group's own −0.45 and −0.46."""
    s = torch.tensor([[0.9, 0.8, 0.05, 0.04, 0.3, 0.29, 0.28, 0.27]], dtype=torch.float64)
    gate = make("sigmoid_bias", top_k=3, n_groups=2, top_groups=1)
    gate.bias.copy_(torch.tensor([0, 0, -0.5, -0.5, 0, 0, 0, 0]))
    assert gate.choose(s.logit())[0].tolist() == [[0, 1, 2]]


def test_groups_are_neighbours_and_the_best_ones_stay() -> None:
    scores = torch.arange(12.0)[None]
    kept = keep_groups(scores, torch.tensor([[5.0, 1.0, 7.0, 6.0]]), 2)
    assert kept.isfinite().nonzero()[:, 1].tolist() == [6, 7, 8, 9, 10, 11]


def test_group_of_one_expert_is_scored_by_it_alone(make: Callable[..., Gating]) -> None:
    gate = make("sigmoid_bias", top_k=2, n_groups=8, top_groups=2)
    assert gate.choose(LOGITS)[0].tolist() == [[3, 0], [2, 6]]


# --- what every gate promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_come_in_order_and_without_a_batch_too(make: Callable[..., Gating], name: str) -> None:
    gate, x = make(name, balance={"name": "expert"}), tokens(1, 63)
    batched, flat = gate(x), gate(x[0])
    assert torch.equal(batched.experts, flat.experts) and torch.equal(batched.weights, flat.weights)
    assert batched.losses == flat.losses
    alone = gate(x[:, 17:18])
    assert torch.equal(alone.experts[0], batched.experts[17])


@pytest.mark.parametrize("name", LEARNED)
def test_gate_without_balance_reports_no_loss(make: Callable[..., Gating], name: str) -> None:
    assert make(name)(tokens(1, 5)).losses == {}


@pytest.mark.parametrize("name", LEARNED)
def test_router_computes_in_single_precision_in_a_model_of_half(make: Callable[..., Gating], name: str) -> None:
    half, x = make(name, dtype=torch.bfloat16), tokens(2, 63).bfloat16()
    single = make(name, dtype=torch.bfloat16)
    single.weight.data = single.weight.data.float()
    for one, other in zip(half(x)[:3], single(x.float())[:3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LEARNED)
def test_router_computes_in_single_precision_under_autocast(make: Callable[..., Gating], name: str) -> None:
    gate, x = make(name), tokens(2, 63)
    plain = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = gate(x)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], lowered[:3], strict=True))


@pytest.mark.parametrize("name", LEARNED)
def test_gradient_reaches_the_router_through_the_weights(make: Callable[..., Gating], name: str) -> None:
    gate, x = make(name), tokens(1, 63).requires_grad_()
    routing = gate(x)
    (routing.weights * torch.randn_like(routing.weights)).sum().backward()
    assert gate.weight.grad.isfinite().all() and (gate.weight.grad.norm(dim=1) > 0).all()
    assert x.grad.norm() > 0


@pytest.mark.parametrize("name", GATES)
def test_all_experts_at_once_is_a_choice_too(make: Callable[..., Gating], name: str) -> None:
    grouped = "n_groups" in registry.lookup("gating", name).schema.parameters
    groups = {"n_groups": 1, "top_groups": 1} if grouped else {}
    gate = make(name, top_k=8, **groups)
    gate.reset_parameters()
    routing = gate(tokens(1, 5), torch.arange(5)[None])
    assert routing.load.tolist() == [5.0] * 8


# --- the balancing bias -----------------------------------------------------------------------------------------------


def test_bias_sways_the_choice_and_not_the_weight(make: Callable[..., Gating]) -> None:
    gate = make("sigmoid_bias", top_k=2, renormalise=False)
    gate.bias[4] = 10.0
    experts, weights, probs = gate.choose(LOGITS)
    assert (experts == 4).any(1).all()
    torch.testing.assert_close(weights, probs.gather(1, experts), rtol=0, atol=0)


def test_bias_has_no_gradient_and_is_saved(make: Callable[..., Gating]) -> None:
    gate = make("sigmoid_bias")
    assert "bias" not in dict(gate.named_parameters()) and "bias" in gate.state_dict()
    gate(tokens(1, 5)).weights.sum().backward()
    assert gate.bias.grad is None and not gate.bias.requires_grad


def test_forward_never_moves_the_bias(make: Callable[..., Gating]) -> None:
    gate = make("sigmoid_bias").train()
    gate.bias.copy_(BIAS)
    for _ in range(3):
        gate(tokens(2, 63)).weights.sum().backward()
    assert torch.equal(gate.bias, BIAS)


def test_update_moves_the_bias_one_step_against_the_load(make: Callable[..., Gating]) -> None:
    gate = make("sigmoid_bias", bias_step=0.25)
    gate.bias.copy_(BIAS)
    gate.update(torch.tensor([10.0, 0, 4, 3, 5, 4, 4, 2]))
    assert torch.equal(gate.bias, BIAS + 0.25 * torch.tensor([-1.0, 1, 0, 1, -1, 0, 0, 1]))


def test_updates_even_out_the_load(make: Callable[..., Gating]) -> None:
    gate, x = make("sigmoid_bias", bias_step=0.01), tokens(4, 63) + 0.5 * tokens(seed=9)
    before = gate(x).load
    assert before.max() > 2 * before.mean()
    for _ in range(150):
        gate.update(gate(x).load)
    assert gate(x).load.max() < 1.3 * before.mean()


def test_bias_of_a_gate_with_shared_experts_follows_the_routed_ones(make: Callable[..., Gating]) -> None:
    gate = make("sigmoid_sink", top_k=4, n_shared=2, bias_step=0.5)
    routing = gate(tokens(2, 31))
    assert routing.experts.shape[1] == 4 and bool((routing.experts[:, 2:] == torch.tensor([6, 7])).all())
    torch.testing.assert_close(routing.weights.sum(1), gate.gain.float().expand(62))
    gate.update(torch.tensor([9.0, 1, 1, 1, 1, 5, 99, 99]))  # the mean of the first six is 3
    assert gate.bias.tolist() == [-0.5, 0.5, 0.5, 0.5, 0.5, -0.5]


def test_a_gate_leaves_experts_to_choose(make: Callable[..., Gating]) -> None:
    with pytest.raises(ConfigError) as refused:
        make("sigmoid_sink", top_k=2, n_shared=2)
    assert refused.value.path.endswith("n_shared") and "top_k" in refused.value.rule


@pytest.mark.parametrize("name", [n for n in GATES if not n.endswith(("_bias", "_sink"))])
def test_update_leaves_gates_without_state_alone(make: Callable[..., Gating], name: str) -> None:
    gate = make(name)
    before = {k: v.clone() for k, v in gate.state_dict().items()}
    gate.update(torch.arange(8.0))
    assert all(torch.equal(v, before[k]) for k, v in gate.state_dict().items())


def test_bias_keeps_its_precision_in_a_model_of_half(make: Callable[..., Gating]) -> None:
    """In bf16 a step of 0.001 is lost beside a bias of 0.5, and the balancing would stop."""
    gate = make("sigmoid_bias")
    gate.bias.copy_(torch.arange(8) / 7)
    gate = gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.bias, torch.arange(8) / 7)
    for _ in range(1000):
        gate.update(torch.tensor([0.0] + [1.0] * 7))
    torch.testing.assert_close(gate.bias[0].item(), 1.0, rtol=0, atol=1e-4)
    assert gate.to("meta").bias.is_meta


def test_bias_rests_after_its_steps_and_a_checkpoint_remembers_them(make: Callable[..., Gating]) -> None:
    load = torch.tensor([1.0] + [0.0] * 7)
    gate = make("sigmoid_bias", bias_step=0.5, bias_until=2)
    gate.update(load)
    resumed = make("sigmoid_bias", bias_step=0.5, bias_until=2)
    resumed.load_state_dict(gate.state_dict())
    for _ in range(3):
        resumed.update(load)
    assert resumed.bias.tolist() == [-1.0] + [1.0] * 7


# --- variants of the published gates ----------------------------------------------------------------------------------


def test_masking_with_zero_may_choose_outside_the_kept_groups(make: Callable[..., Gating]) -> None:
    """As DeepSeek's Hugging Face code: −0.45 and −0.46 in the kept group lose to the zeros of the other."""
    s = torch.tensor([[0.9, 0.8, 0.05, 0.04, 0.3, 0.29, 0.28, 0.27]], dtype=torch.float64)
    gate = make("sigmoid_bias", top_k=3, n_groups=2, top_groups=1, masked="zero")
    gate.bias.copy_(torch.tensor([0, 0, -0.5, -0.5, 0, 0, 0, 0]))
    chosen = set(gate.choose(s.logit())[0][0].tolist())
    assert {0, 1} < chosen and chosen & {4, 5, 6, 7}


def test_group_limited_weights_can_be_renormalised_and_are_scaled_then_too(make: Callable[..., Gating]) -> None:
    groups = {"top_k": 3, "n_groups": 4, "top_groups": 2}
    _, plain, _ = make("group_limited", **groups).choose(LOGITS)
    _, weights, _ = make("group_limited", renormalise=True, scaling=2.5, **groups).choose(LOGITS)
    torch.testing.assert_close(weights, 2.5 * plain / plain.sum(-1, keepdim=True), rtol=0, atol=1e-12)


def test_topk_softmax_is_the_renormalised_softmax_topk(make: Callable[..., Gating]) -> None:
    one = make("topk_softmax", top_k=3).choose(LOGITS)
    other = make("softmax_topk", top_k=3, renormalise=True).choose(LOGITS)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_router_bias_is_added_to_the_logits(make: Callable[..., Gating]) -> None:
    gate, x = make("topk_softmax", top_k=3, bias=True), tokens(1, 7)
    logits = x[0] @ gate.weight.t() + gate.logit_bias
    assert torch.equal(gate(x).experts, logits.topk(3).indices)
    assert make("topk_softmax").logit_bias is None


# --- gates that look at the batch, or at the token's id ---------------------------------------------------------------


@pytest.mark.parametrize(("n_tokens", "top_k"), [(63, 2), (64, 3), (5, 1), (3, 8)])
def test_each_expert_chooses_as_many_tokens(make: Callable[..., Gating], n_tokens: int, top_k: int) -> None:
    routing = make("expert_choice", top_k=top_k)(tokens(1, n_tokens))
    capacity = min(n_tokens, max(1, n_tokens * top_k // 8))
    assert routing.load.tolist() == [float(capacity)] * 8
    assert routing.pairs == capacity * 8 == int((routing.experts < 8).sum())
    assert (routing.weights[routing.experts == 8] == 0).all()


def test_an_expert_chooses_the_tokens_of_highest_affinity(make: Callable[..., Gating]) -> None:
    routing = make("expert_choice", top_k=2)(tokens(1, 20))
    for e in range(8):
        best = routing.probs[:, e].topk(5).indices
        assert set((routing.experts[:, e] == e).nonzero()[:, 0].tolist()) == set(best.tolist())
        assert torch.equal(routing.weights[best, e], routing.probs[best, e])


def test_sinkhorn_evens_out_what_top_k_would_pile_up(make: Callable[..., Gating]) -> None:
    gate, x = make("sinkhorn", top_k=1, iterations=50), tokens(4, 63) + 0.5 * tokens(seed=9)
    even, piled = gate(x).load, gate.eval()(x).load
    assert even.max() < 1.3 * even.mean() and piled.max() > 2 * piled.mean()


def test_sinkhorn_scales_rows_and_columns_to_even_sums() -> None:
    scaled = balanced(LOGITS.repeat(4, 1) + torch.randn(8, 8, dtype=torch.float64), 200).exp()
    torch.testing.assert_close(scaled.sum(0), torch.full((8,), scaled.sum() / 8), check_dtype=False, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.sum(1), torch.full((8,), scaled.sum() / 8), check_dtype=False, rtol=1e-6, atol=0)


def test_sinkhorn_in_evaluation_takes_the_highest_logits_one_token_at_a_time(make: Callable[..., Gating]) -> None:
    gate, x = make("sinkhorn", top_k=2).eval(), tokens(1, 21)
    assert torch.equal(gate(x).experts[3:4], gate(x[:, 3:4]).experts)
    torch.testing.assert_close(gate(x).weights, gate(x).probs.gather(1, gate(x).experts), rtol=0, atol=0)


def test_hash_depends_on_the_tokens_id_alone(make: Callable[..., Gating]) -> None:
    gate, ids = make("hash", top_k=3), torch.arange(61)[None]
    gate.reset_parameters()
    routing, again = gate(tokens(1, 61), ids), gate(tokens(1, 61, seed=1), ids)
    assert torch.equal(routing.experts, again.experts) and (routing.weights == 1 / 3).all()
    assert all(len(set(row)) == 3 for row in routing.experts.tolist())
    assert len({tuple(row) for row in routing.experts.tolist()}) > 30


@pytest.mark.parametrize("name", HASHED)
def test_hash_without_ids_says_what_is_missing(make: Callable[..., Gating], name: str) -> None:
    with pytest.raises(BlockError, match="ids"):
        make(name)(tokens(1, 5))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-6)])  # the router is in fp32
def test_learned_weights_of_a_hash_are_those_of_deepseek_v4(
    make: Callable[..., Gating], dtype: torch.dtype, bound: float
) -> None:
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
    torch.testing.assert_close(found.weights.to(dtype), weights, rtol=0, atol=bound)
    found.weights[:, 0].sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad.any()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "parameter"),
    [
        *[({"name": n, "top_k": k}, "top_k") for n in GATES for k in (0, -1, 9)],
        *[({"name": n, "n_groups": g}, "n_groups") for n in ("group_limited", "sigmoid_bias") for g in (0, -2, 3, 16)],
        *[
            ({"name": n, "n_groups": 4, "top_groups": g}, "top_groups")
            for n in ("group_limited", "sigmoid_bias")
            for g in (0, 5)
        ],
        *[
            ({"name": n, "n_groups": 4, "top_groups": 1, "top_k": 3}, "top_k")
            for n in ("group_limited", "sigmoid_bias")
        ],
    ],
    ids=str,
)
def test_impossible_choices_are_refused_by_name(
    make: Callable[..., Gating], node: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(node)
    assert caught.value.path == f"model.gating.{parameter}"
    assert caught.value.value == node[parameter] and caught.value.rule and caught.value.remedy
