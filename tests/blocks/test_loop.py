"""Loops against an unrolled copy that shares the weights, and against the formulas of Huginn and Ouro."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.compose import check, compose
from blockwright.blocks.cost import cache_bytes, count_parameters, flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.initialise import stable_seed
from blockwright.blocks.sample import sample
from blockwright.registry import BlockError, ConfigError
from blockwright.training.compiling import compile_layers
from blockwright.training.parallel.recompute import recompute

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 36,
    "n_layers": 4,
    "max_positions": 64,
    "attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 3},
    "position": "rope",
    "ffn": {"name": "swiglu", "d_ff": 23},
    "norm": "rmsnorm",
    "residual": "prenorm",
    "init": {"std": 0.2, "depth_scaled": False},
}
CYCLE = {"name": "cycle", "first": 1, "last": 2, "visits": 3}
GATE = {"name": "gate", "entropy": 0.3, "threshold": 0.6}
OURO = {"name": "cycle", "visits": 3, "entry": "normed", "exit": GATE}
TOKENS = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[0] * 5 + [1] * 12, [0] * 9 + [1] * 7 + [-1]])
POSITIONS = torch.tensor([[*range(5), *range(12)], [*range(9), *range(7), 0]])
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5}


def looped(loop: dict[str, Any] | None, dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    decoder = compose({**MODEL, **({"loop": loop} if loop else {}), **changes}).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in decoder.parameters() if p.ndim < 2):
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).to(dtype), alpha=0.1
            )
    return decoder.eval()


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def assert_near(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(one, other, rtol=EXACT[dtype], atol=EXACT[dtype])


# --- a deeper model that shares weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("name", "order"), [("cycle", [0, 1, 2, 1, 2, 1, 2, 3]), ("repeat", [0, 1, 1, 1, 2, 2, 2, 3])])
def test_loop_is_a_deeper_model_with_shared_weights(name: str, order: list[int], dtype: torch.dtype) -> None:
    decoder = looped({**CYCLE, "name": name}, dtype)
    unrolled = decoder.with_layers(decoder.layers[i] for i in order)
    assert decoder.order() == order
    assert unrolled.order() == list(range(8))
    for documents in ((None, None), (POSITIONS, SEGMENTS)):
        ours, theirs = (model.hidden(TOKENS, *documents)[0] for model in (decoder, unrolled))
        assert_near(ours, theirs, dtype)
        found = gradients(decoder, ours[SEGMENTS >= 0].square().sum())
        wanted = gradients(decoder, theirs[SEGMENTS >= 0].square().sum())
        for key, grad in wanted.items():
            assert_near(found[key] / grad.abs().max(), grad / grad.abs().max(), dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": {"name": "gated_delta", "n_heads": 3}},
        {"attention": {"name": "sliding_window", "n_heads": 6, "n_kv_heads": 3, "window": 4}},
        {"attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 3, "values": "value_residual"}},
        {"residual": {"name": "mhc", "n_streams": 3}},
    ],
    ids=["recurrence", "window", "carry", "streams"],
)
def test_every_visit_has_a_cache_of_its_own(changes: dict[str, Any]) -> None:
    """In parts of any length, and taken back: as the unrolled model in one pass."""
    decoder = looped(CYCLE, **changes)
    whole = decoder.with_layers(decoder.layers[i] for i in decoder.order()).hidden(TOKENS)[0]
    caches = decoder.new_caches(2, 20)
    assert len(caches) == 8
    with torch.no_grad():
        for part, right in zip(TOKENS[:, :11].split([4, 1, 6], 1), whole[:, :11].split([4, 1, 6], 1), strict=True):
            assert_near(decoder.hidden(part, caches=caches)[0], right)
        marks = [cache.mark(3) for cache in caches]
        decoder.hidden((TOKENS[:, 11:14] + 1) % 61, caches=caches)
        for cache, mark in zip(caches, marks, strict=True):
            cache.rewind(mark)
        for t in range(11, 17):
            assert_near(decoder.last_hidden(TOKENS[:, t : t + 1], caches)[:, 0], whole[:, t])


def test_costs_count_parameters_once_and_flops_and_caches_for_each_visit() -> None:
    model = {**MODEL, "loop": CYCLE}
    decoder, plain = compose(model, device="meta"), compose(MODEL, device="meta")
    assert count_parameters(decoder).total == count_parameters(plain).total
    unrolled = compose({**MODEL, "n_layers": 8}, device="meta")
    for card in (decoder, sample(model)):
        assert flops_per_token(card, 50) == flops_per_token(unrolled, 50)
        assert cache_bytes(card, 50, torch.float32) == sum(
            c.nbytes for c in looped(CYCLE, torch.float32).new_caches(1, 50)
        )
    assert decoder.visits([0, 1, 2]) == 7


def test_recomputed_layers_have_the_same_gradients() -> None:
    decoder = looped({**CYCLE, "entry": "adapter"}).train()
    wanted = gradients(decoder, decoder.hidden(TOKENS)[0].square().sum())
    for layer in decoder.layers:
        recompute(layer, "full")
    for name, grad in gradients(decoder, decoder.hidden(TOKENS)[0].square().sum()).items():
        assert_near(grad, wanted[name])


@pytest.mark.slow
def test_compiled_layers_have_the_same_gradients() -> None:
    decoder = looped({**CYCLE, "entry": "add"}, torch.float32).train()
    wanted = gradients(decoder, decoder.hidden(TOKENS)[0].square().sum())
    compile_layers(decoder, backend="eager", fullgraph=True)
    for name, grad in gradients(decoder, decoder.hidden(TOKENS)[0].square().sum()).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4 * float(wanted[name].abs().max()))


# --- Huginn -----------------------------------------------------------------------------------------------------------


def huginn(decoder: Decoder, visits: int, gradient_visits: int | None = None) -> Tensor:
    """arXiv 2502.05171, slowly: prelude, visits that read the state and the input, a norm, coda, the norm again."""
    given = Pass(torch.arange(17)[None], tokens=TOKENS)
    layers: Any = decoder.layers

    def through(x: Tensor, indices: tuple[int, ...]) -> Tensor:
        for i in indices:
            x = layers[i](x, given, (False, False))[0]
        return x

    e = through(decoder.look_up(TOKENS), (0,))
    weight: Any = decoder.get_parameter("loop.entry.weight")
    state = torch.zeros_like(e)
    for n in range(visits):
        if gradient_visits is not None and n == visits - gradient_visits:
            state = state.detach()
        state = through(state @ weight[:, :36].T + e @ weight[:, 36:].T, (1, 2))
    return decoder.norm(through(decoder.norm(state), (3,)))


@pytest.mark.parametrize("dtype", EXACT)
def test_adapter_is_huginn(dtype: torch.dtype) -> None:
    decoder = looped({**CYCLE, "entry": "adapter"}, dtype, residual="pre_postnorm")
    ours, theirs = decoder.hidden(TOKENS)[0], huginn(decoder, 3)
    assert_near(ours, theirs, dtype)
    found, wanted = (gradients(decoder, x.sin().sum()) for x in (ours, theirs))
    for name, grad in wanted.items():
        assert_near(found[name] / grad.abs().max(), grad / grad.abs().max(), dtype)


def test_gradients_pass_through_the_last_visits_only() -> None:
    decoder = looped({**CYCLE, "visits": 5, "entry": "adapter", "gradient_visits": 2})
    ours = gradients(decoder, decoder.hidden(TOKENS)[0].sin().sum())
    theirs = gradients(decoder, huginn(decoder, 5, 2).sin().sum())
    whole = gradients(decoder, huginn(decoder, 5).sin().sum())
    for name, grad in theirs.items():
        assert_near(ours[name], grad)
    assert not torch.allclose(ours["loop.entry.weight"], whole["loop.entry.weight"])


def test_loop_starts_from_noise_in_training_and_from_zeros_in_evaluation() -> None:
    decoder = looped({**CYCLE, "entry": {"name": "adapter", "noise": 0.5}})
    first, second = decoder.hidden(TOKENS)[0], decoder.hidden(TOKENS)[0]
    assert torch.equal(first, second)
    entry: Any = decoder.loop.entry.train()  # type: ignore[union-attr]
    noise = entry._start(torch.zeros(40, 40, 36))
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(0.5 * 0.98658, rel=0.01)  # a normal distribution that is cut off at 3 σ
    assert noise.abs().max() <= 1.5


# --- how many visits --------------------------------------------------------------------------------------------------


def test_a_step_draws_its_visits_from_the_seed_alone() -> None:
    loop = {**CYCLE, "visit_draw": {"name": "uniform", "least": 2, "most": 6}}
    one, other = looped(loop).train(), looped(loop).train()
    drawn = []
    for step in range(40):
        for decoder in (one, other):
            decoder.begin_step(stable_seed(3, f"step {step}"))
            torch.rand(7)  # what else is drawn changes nothing
        assert one.order(cached=False) == other.order(cached=False)
        drawn.append(one.loop.drawn_visits)  # type: ignore[union-attr]
    assert set(drawn) == {2, 3, 4, 5, 6}
    assert len(one.new_caches(1, 4)) == len(one.eval().order(cached=False)) == 8  # 3 visits outside of training


def test_nothing_is_drawn_before_a_step_begins() -> None:
    decoder = looped({**CYCLE, "visit_draw": {"name": "uniform", "least": 7, "most": 7}}).train()
    assert decoder.order(cached=False) == decoder.order(cached=True)
    decoder.begin_step(0)
    assert len(decoder.order(cached=False)) == 2 + 2 * 7


def test_poisson_lognormal_has_its_mean_and_spread() -> None:
    """r − 1 has the mean r̄, and the variance of a Poisson mixture: r̄ + r̄² (e^σ² − 1)."""
    draw: Any = registry.lookup("visit_draw", "poisson_lognormal").cls(visits=32)  # type: ignore[call-arg]
    drawn = torch.tensor([draw.visits_of(seed) for seed in range(4000)]).double()
    spread = (32 + 32**2 * (torch.tensor(0.25).exp() - 1)).sqrt().item()
    assert drawn.mean() == pytest.approx(33, abs=4 * spread / 4000**0.5)
    assert drawn.std() == pytest.approx(spread, rel=0.1)
    assert drawn.min() >= 1


def test_another_number_of_visits_is_that_of_another_composition() -> None:
    decoder = looped(CYCLE)
    deeper, composed = decoder.with_visits(5), looped({**CYCLE, "visits": 5})
    assert deeper.config == composed.config
    assert_near(deeper.hidden(TOKENS)[0], composed.hidden(TOKENS)[0])
    assert len(deeper.new_caches(1, 4)) == 12
    assert decoder.order() == [0, 1, 2, 1, 2, 1, 2, 3]
    assert deeper.layers[1] is decoder.layers[1]


# --- exits ------------------------------------------------------------------------------------------------------------


def ouro(decoder: Decoder) -> tuple[list[Tensor], Tensor]:
    """arXiv 2510.25741, slowly: the normalised states after each visit, and the probabilities to leave."""
    given = Pass(torch.arange(17)[None], tokens=TOKENS)
    x, states, left, found = decoder.look_up(TOKENS), list[Tensor](), torch.ones(2, 17, dtype=torch.float64), []
    for n in range(3):
        for layer in decoder.layers:
            x = layer(x, given, (False, False))[0]
        x = decoder.norm(x)
        states.append(x)
        gate = torch.sigmoid(x @ decoder.get_parameter("loop.exit.weight")[0] + decoder.get_parameter("loop.exit.bias"))
        found.append(left if n == 2 else left * gate)
        left = left - left * gate
    return states, torch.stack(found)


def test_exits_train_on_the_expected_loss_and_the_entropy() -> None:
    decoder, targets = looped(OURO), TOKENS.roll(-1, 1).index_fill(1, torch.tensor([3]), -100)
    right, p = ouro(decoder)
    nll = torch.stack([F.cross_entropy(decoder.logits(h).mT, targets, reduction="none") for h in right])
    wanted = gradients(decoder, (p * nll).sum() + 0.3 * (p * p.log()).sum(0).mean())
    states, routings = decoder.train().exits(TOKENS)
    for h, other in zip(states, right, strict=True):
        assert_near(h, other)
    loss = decoder.expected_nll(states, targets)
    assert_near(loss, (p * nll).sum())
    assert routings[-1] is not None
    found = gradients(decoder, loss + routings[-1].losses["exit_entropy"])
    for name, grad in wanted.items():
        assert_near(found[name], grad)


def test_a_token_leaves_with_the_state_of_the_first_visit_above_the_threshold() -> None:
    decoder = looped(OURO)
    states, p = ouro(decoder)
    first = (p.cumsum(0) >= 0.6).int().argmax(0)
    assert set(first.flatten().tolist()) == {0, 1, 2}
    right = torch.stack(states).gather(0, first[None, ..., None].expand(1, 2, 17, 36))[0]
    with torch.no_grad():
        assert_near(decoder.hidden(TOKENS)[0], right)
        caches = decoder.new_caches(2, 17)
        for t in range(17):
            assert_near(decoder.last_hidden(TOKENS[:, t : t + 1], caches)[:, 0], right[:, t])
    decoder.loop.exit.threshold = None  # type: ignore[union-attr, assignment]
    assert_near(decoder.hidden(TOKENS)[0], states[-1])


# --- experts, drafts --------------------------------------------------------------------------------------------------


def test_each_visit_routes_by_itself() -> None:
    experts = {
        "ffn": {"name": "moe", "n_experts": 5},
        "gating": {"name": "softmax_topk", "top_k": 2, "balance": {"name": "expert", "alpha": 0.01}},
        "experts": {"name": "swiglu", "d_ff": 7},
    }
    decoder = looped(CYCLE, **experts)
    _, routings = decoder.hidden(TOKENS)
    assert len(routings) == 8
    assert all(routing is not None and int(routing.load.sum()) == 2 * TOKENS.numel() for routing in routings)
    _, again = decoder.hidden(TOKENS, experts=[routing.experts for routing in routings if routing is not None])
    for one, other in zip(routings, again, strict=True):
        assert torch.equal(one.experts, other.experts)  # type: ignore[union-attr]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"loop": {**CYCLE, "last": 4}}, "model.loop.last"),
        ({"loop": {**CYCLE, "first": 3}}, "model.loop.last"),
        ({"loop": {**CYCLE, "first": -5}}, "model.loop.first"),
        ({"loop": {**CYCLE, "visits": 0}}, "model.loop.visits"),
        ({"loop": {**CYCLE, "visits": 1025}}, "model.loop.visits"),
        ({"loop": {**CYCLE, "visit": 3}}, "model.loop.visit"),
        ({"loop": {**CYCLE, "exit": GATE}}, "model.loop.exit"),
        ({"loop": {**OURO, "name": "repeat"}}, "model.loop.exit"),
        ({"loop": {**CYCLE, "gradient_visits": 1}}, "model.loop.gradient_visits"),
        ({"loop": {**CYCLE, "visit_draw": {"name": "uniform", "least": 4}}}, "model.loop.visit_draw.least"),
        ({"loop": {**CYCLE, "entry": "add"}, "residual": "mhc"}, "model.loop.entry"),
        ({"entry": "add"}, "model.entry"),
        ({"layout": {"loop": "cycle*4"}}, "model.layout.loop"),
    ],
)
def test_loop_that_cannot_be_is_refused_where_it_is_written(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check({**copy.deepcopy(MODEL), **changes})
    assert refusal.value.path == path
    assert refusal.value.remedy


@pytest.mark.parametrize(("loop", "visits"), [(CYCLE, 0), (CYCLE, 1025), (CYCLE, True), (None, 2)])
def test_visits_that_cannot_be_are_refused(loop: dict[str, Any] | None, visits: int) -> None:
    with pytest.raises(BlockError, match="visits"):
        looped(loop).with_visits(visits)


@pytest.mark.parametrize("leave", registry.names("exit"))
@pytest.mark.parametrize("entry", registry.names("entry"))
def test_every_weight_has_a_gradient_however_many_visits_are_drawn(entry: str, leave: str) -> None:
    """DDP ends a training in which a weight has none in a step, as a gate that the only visit does not read."""
    decoder = looped({**CYCLE, "last": -1, "entry": entry, "exit": leave}).train()
    for visits in (1, 2, 3):
        assert decoder.loop is not None and decoder.loop.exit is not None
        decoder.loop.drawn_visits = visits
        states, routings = decoder.exits(TOKENS)
        probabilities = decoder.loop.exit.probabilities(states)
        loss = sum(p.mean() * h.square().mean() for p, h in zip(probabilities, states, strict=True))
        found = gradients(decoder, loss + sum(sum(r.losses.values()) for r in routings if r is not None))
        assert {name for name, _ in decoder.named_parameters()} - found.keys() <= {"head.weight"}, visits
