"""Loops against an unrolled copy that shares the weights, and against the formulas of Huginn and Ouro."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes, count_parameters, flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.initialise import stable_seed
from blockwright.blocks.sample import sample
from blockwright.registry import BlockError
from blockwright.training.compiling import compile_layers
from blockwright.training.parallel.recompute import recompute
from tests.blocks.small import decoder as small
from tests.blocks.small import ids, model, rewind

CYCLE = {"name": "cycle", "first": 1, "last": 2, "visits": 3}
GATE = {"name": "gate", "entropy": 0.3, "threshold": 0.6}
OURO = {"name": "cycle", "visits": 3, "entry": "normed", "exit": GATE}
TOKENS, D = ids(17), 36
ODD: dict[str, Any] = {"n_layers": 4, "d_model": D, "ffn": {"name": "swiglu", "d_ff": 23}}
ODD |= {"attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 3}}
SEGMENTS = torch.tensor([[0] * 5 + [1] * 12, [0] * 9 + [1] * 7 + [-1]])
POSITIONS = torch.tensor([[*range(5), *range(12)], [*range(9), *range(7), 0]])
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5}


def looped(loop: dict[str, Any] | None, dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    decoder = small(dtype, **{**ODD, **({"loop": loop} if loop else {}), **changes})
    with torch.no_grad():
        for i, parameter in enumerate(p for p in decoder.parameters() if p.ndim < 2):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.add_(noise.to(dtype), alpha=0.1)
    return decoder


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def assert_near(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(one, other, rtol=EXACT[dtype], atol=EXACT[dtype])


@pytest.mark.parametrize(
    ("name", "order", "dtype"),
    [("cycle", [0, 1, 2, 1, 2, 1, 2, 3], torch.float64), ("repeat", [0, 1, 1, 1, 2, 2, 2, 3], torch.float32)],
)
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
        rewind(caches, marks)
        for t in range(11, 17):
            assert_near(decoder.last_hidden(TOKENS[:, t : t + 1], caches)[:, 0], whole[:, t])


def test_costs_count_parameters_once_and_flops_and_caches_for_each_visit() -> None:
    config = model(**ODD, loop=CYCLE)
    decoder, plain, unrolled = (
        compose(model(**changes), device="meta") for changes in (config, ODD, {**ODD, "n_layers": 8})
    )
    assert count_parameters(decoder).total == count_parameters(plain).total and decoder.visits([0, 1, 2]) == 7
    caches = sum(c.nbytes for c in looped(CYCLE, torch.float32).new_caches(1, 50))
    for card in (decoder, sample(config)):
        assert flops_per_token(card, 50) == flops_per_token(unrolled, 50)
        assert cache_bytes(card, 50, torch.float32) == caches


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
        state = through(state @ weight[:, :D].T + e @ weight[:, D:].T, (1, 2))
    return decoder.norm(through(decoder.norm(state), (3,)))


@pytest.mark.parametrize(("dtype", "through"), [(torch.float32, None), (torch.float64, None), (torch.float64, 2)])
def test_adapter_is_huginn_whose_gradients_pass_through_the_last_visits(dtype: torch.dtype, through: Any) -> None:
    visits = {"visits": 5, "gradient_visits": 2} if through else {}
    decoder = looped({**CYCLE, "entry": "adapter", **visits}, dtype, residual="pre_postnorm")
    ours, theirs = decoder.hidden(TOKENS)[0], huginn(decoder, 5 if through else 3, through)
    assert_near(ours, theirs, dtype)
    found, wanted = (gradients(decoder, x.sin().sum()) for x in (ours, theirs))
    for name, grad in wanted.items():
        assert_near(found[name] / grad.abs().max(), grad / grad.abs().max(), dtype)
    if through:
        whole = gradients(decoder, huginn(decoder, 5).sin().sum())
        assert not torch.allclose(found["loop.entry.weight"], whole["loop.entry.weight"])


def test_loop_starts_from_noise_in_training_and_from_zeros_in_evaluation() -> None:
    decoder = looped({**CYCLE, "entry": {"name": "adapter", "noise": 0.5}})
    first, second = decoder.hidden(TOKENS)[0], decoder.hidden(TOKENS)[0]
    assert torch.equal(first, second)
    entry: Any = decoder.loop.entry.train()
    noise = entry._start(torch.zeros(40, 40, D))
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(0.5 * 0.98658, rel=0.01)  # a normal distribution that is cut off at 3 σ
    assert noise.abs().max() <= 1.5


def test_a_step_draws_its_visits_from_the_seed_alone_and_nothing_before() -> None:
    loop = {**CYCLE, "visit_draw": {"name": "uniform", "least": 2, "most": 6}}
    one, other = (looped(loop, n_layers=3).train() for _ in range(2))
    assert one.order(cached=False) == one.order(cached=True)
    drawn = set()
    for step in range(40):
        for decoder in (one, other):
            decoder.begin_step(stable_seed(3, f"step {step}"))
            torch.rand(7)  # what else is drawn changes nothing
        assert one.order(cached=False) == other.order(cached=False)
        drawn.add(one.loop.drawn_visits)
    assert drawn == {2, 3, 4, 5, 6} and len(one.order(cached=False)) == 1 + 2 * one.loop.drawn_visits
    assert len(one.new_caches(1, 4)) == len(one.eval().order(cached=False)) == 7  # 3 visits outside of training


def test_poisson_lognormal_has_its_mean_and_spread() -> None:
    """r − 1 has the mean r̄, and the variance of a Poisson mixture: r̄ + r̄² (e^σ² − 1)."""
    draw: Any = registry.lookup("visit_draw", "poisson_lognormal").cls(visits=32)
    found = torch.tensor([draw.visits_of(seed) for seed in range(4000)]).double()
    spread = (32 + 32**2 * (torch.tensor(0.25).exp() - 1)).sqrt().item()
    assert found.mean() == pytest.approx(33, abs=4 * spread / 4000**0.5)
    assert found.std() == pytest.approx(spread, rel=0.1)
    assert found.min() >= 1


def test_another_number_of_visits_is_that_of_another_composition() -> None:
    decoder = looped(CYCLE)
    deeper, composed = decoder.with_visits(5), looped({**CYCLE, "visits": 5})
    assert deeper.config == composed.config
    assert_near(deeper.hidden(TOKENS)[0], composed.hidden(TOKENS)[0])
    assert len(deeper.new_caches(1, 4)) == 12
    assert decoder.order() == [0, 1, 2, 1, 2, 1, 2, 3]
    assert deeper.layers[1] is decoder.layers[1]


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
    right = torch.stack(states).gather(0, first[None, ..., None].expand(1, 2, 17, D))[0]
    with torch.no_grad():
        assert_near(decoder.hidden(TOKENS)[0], right)
        caches = decoder.new_caches(2, 17)
        for t in range(17):
            assert_near(decoder.last_hidden(TOKENS[:, t : t + 1], caches)[:, 0], right[:, t])
    decoder.loop.exit.threshold = None
    assert_near(decoder.hidden(TOKENS)[0], states[-1])


def test_each_visit_routes_by_itself() -> None:
    gating = {"name": "softmax_topk", "top_k": 2, "balance": {"name": "expert", "alpha": 0.01}}
    moe, experts = {"name": "moe", "n_experts": 5}, {"name": "swiglu", "d_ff": 7}
    decoder = looped(CYCLE, ffn=moe, gating=gating, experts=experts)
    _, routings = decoder.hidden(TOKENS)
    assert len(routings) == 8
    assert all(routing is not None and int(routing.load.sum()) == 2 * TOKENS.numel() for routing in routings)
    _, again = decoder.hidden(TOKENS, experts=[routing.experts for routing in routings if routing is not None])
    for one, other in zip(routings, again, strict=True):
        assert torch.equal(one.experts, other.experts)


@pytest.mark.parametrize(("loop", "visits"), [(CYCLE, 0), (CYCLE, 1025), (CYCLE, True), (None, 2)])
def test_visits_that_cannot_be_are_refused(loop: dict[str, Any] | None, visits: int) -> None:
    with pytest.raises(BlockError, match="visits"):
        looped(loop).with_visits(visits)


@pytest.mark.parametrize(("entry", "leave"), each(registry.names("entry"), registry.names("exit")))
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
