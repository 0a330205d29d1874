"""Experts against a loop over tokens and choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright import registry
from blockwright.blocks.experts.base import Experts
from blockwright.blocks.gating.base import Routing
from blockwright.registry import ConfigError
from tests.blocks.test_formulas import EXPERTS as FORMULAS
from tests.blocks.test_formulas import by_token

EXPERTS = [n for n in registry.names("experts") if "d_ff" in registry.lookup("experts", n).schema.parameters]
T, D, E, K = 63, 48, 6, 3


@pytest.fixture(scope="module")
def make(make_block: Callable[..., Any]) -> Callable[..., Experts]:
    def build(name: str = "swiglu", dtype: torch.dtype = torch.float64, d_ff: int = 12, d_model: int = D) -> Experts:
        return make_block("experts", {"name": name, "d_ff": d_ff}, n_experts=E, dtype=dtype, d_model=d_model)

    return build


def routing(experts: Tensor, weights: Tensor) -> Routing:
    return Routing(experts, weights, torch.empty(0), {}, torch.empty(0))


def some_routing(spare: tuple[int, ...] = (), seed: int = 0) -> Routing:
    """Random choices that leave the ``spare`` experts without a token."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=generator)
    scores[:, list(spare)] = -1
    return routing(scores.topk(K).indices, torch.rand(T, K, generator=generator).requires_grad_())


SIZES = [(torch.float64, 12, D, 1e-11), (torch.float32, 12, D, 2e-5), (torch.float32, 7, 45, 2e-5)]


@pytest.mark.parametrize(("name", "size", "spare"), each(EXPERTS, SIZES, [(), (0,), (5,), (1, 2), (0, 2, 5)]), ids=str)
def test_output_and_gradients_equal_a_loop_over_tokens(
    make: Callable[..., Experts], name: str, size: tuple[torch.dtype, int, int, float], spare: tuple[int, ...]
) -> None:
    dtype, d_ff, d_model, tolerance = size
    block, route = make(name, dtype=dtype, d_ff=d_ff, d_model=d_model), some_routing(spare)
    x = (3 * torch.randn(T, d_model, dtype=dtype)).requires_grad_()  # far enough for the clamp to cut
    y, expected = block(x, route), by_token(FORMULAS[name], block, x, route)
    torch.testing.assert_close(y, expected, rtol=0, atol=10 * tolerance)
    learning = (x, route.weights, *block.parameters())
    cotangent = torch.randn_like(y)
    for got, right in zip(
        torch.autograd.grad(y, learning, cotangent), torch.autograd.grad(expected, learning, cotangent), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=30 * tolerance)
    grads = torch.autograd.grad(block(x, route), tuple(block.parameters()), cotangent)
    assert all((g[e] == 0).all() == (e in spare) for g in grads for e in range(E))


@pytest.mark.parametrize("name", EXPERTS)
def test_pairs_without_an_expert_add_nothing_in_either_direction(make: Callable[..., Experts], name: str) -> None:
    block, route, x = make(name), some_routing(), torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    experts = route.experts.masked_fill(torch.rand(T, K) < 0.4, E)
    experts[5] = E
    dropped = route._replace(experts=experts, pairs=int((experts < E).sum()))
    y, expected = block(x, dropped), by_token(FORMULAS[name], block, x, dropped)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    assert (y[5] == 0).all()
    learning, cotangent = (x, route.weights, *block.parameters()), torch.randn_like(y)
    for got, right in zip(
        torch.autograd.grad(y, learning, cotangent), torch.autograd.grad(expected, learning, cotangent), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", EXPERTS)
def test_half_precision_stays_near_double(make: Callable[..., Experts], name: str) -> None:
    half = make(name, torch.bfloat16)
    double = make(name, torch.bfloat16).double()
    x, route = torch.randn(T, D).bfloat16(), some_routing()
    y, expected = half(x, route), double(x.double(), route)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("name", EXPERTS)
def test_autocast_lowers_experts_as_it_does_dense_layers(make: Callable[..., Experts], name: str) -> None:
    block, x, route = make(name, torch.float32), torch.randn(T, D), some_routing()
    plain = block(x, route)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x, route)
    assert y.dtype == torch.bfloat16
    assert (y.float() - plain).norm() < 2e-2 * plain.norm()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("name", EXPERTS)
def test_output_is_linear_in_the_weights_and_blind_to_the_order_of_choices(
    make: Callable[..., Experts], name: str
) -> None:
    block, x, route = make(name), torch.randn(T, D, dtype=torch.float64), some_routing()
    y = block(x, route)
    doubled = block(x, routing(route.experts, 2 * route.weights))
    turned = block(x, routing(route.experts.flip(1), route.weights.flip(1)))
    torch.testing.assert_close(doubled, 2 * y, rtol=0, atol=1e-11)
    torch.testing.assert_close(turned, y, rtol=0, atol=1e-11)
    assert (block(x, routing(route.experts, 0 * route.weights)) == 0).all()


@pytest.mark.parametrize("name", EXPERTS)
def test_runs_repeat_to_the_bit(make: Callable[..., Experts], name: str) -> None:
    block, x, route = make(name, torch.float32), torch.randn(T, D, requires_grad=True), some_routing()
    (first, *rest) = [torch.autograd.grad(block(x, route).square().sum(), (x, *block.parameters())) for _ in range(3)]
    assert all(torch.equal(a, b) for grads in rest for a, b in zip(first, grads, strict=True))


@pytest.mark.parametrize("name", EXPERTS)
def test_weights_are_stacked_by_expert(make: Callable[..., Experts], name: str) -> None:
    block = make(name)
    assert all(p.shape[0] == E for p in block.parameters())
    assert set(block.parallel_plan()) == {n for n, _ in block.named_parameters()}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("d_ff", [0, -4])
def test_width_below_one_is_refused(make: Callable[..., Experts], name: str, d_ff: int) -> None:
    with pytest.raises(ConfigError) as caught:
        make(name, d_ff=d_ff)
    assert caught.value.path == "model.experts.d_ff" and caught.value.value == d_ff


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("latent", [11, None])
def test_latent_mixture_is_that_of_nemotron(
    make_block: Callable[..., Any], latent: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    sizes = {"hidden_size": D, "moe_intermediate_size": 13, "moe_shared_expert_intermediate_size": 9}
    gate = {"num_experts_per_tok": K, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}
    theirs = NemotronHMoE(NemotronHConfig(n_routed_experts=E, moe_latent_size=latent, **sizes, **gate)).to(dtype)
    # Ours is always single up to the weights; theirs would also add up in the precision of these.
    theirs.gate.float().register_forward_hook(lambda module, given, out: (out[0], out[1].to(dtype), out[2]))
    generator = torch.Generator().manual_seed(0)
    for tensor in (*theirs.parameters(), theirs.gate.e_score_correction_bias):
        tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    inner = {"name": "relu2", "d_ff": 13}
    around = {
        "gating": {"name": "sigmoid_bias", "top_k": K, "n_groups": 3, "top_groups": 2, "scaling": 2.5},
        "experts": {"name": "latent", "width": latent, "experts": inner} if latent else inner,
    }
    node = {"name": "moe", "n_experts": E, "shared": {"name": "relu2", "d_ff": 9}}
    ours = make_block("ffn", node, around=around, dtype=dtype)
    experts = ours.experts.experts if latent else ours.experts
    pairs = [
        (ours.gating.weight, theirs.gate.weight),
        (ours.gating.bias, theirs.gate.e_score_correction_bias),
        (experts.up, theirs.experts.up_proj),
        (experts.down, theirs.experts.down_proj),
        (ours.shared.up.weight, theirs.shared_experts.up_proj.weight),
        (ours.shared.down.weight, theirs.shared_experts.down_proj.weight),
    ]
    if latent:
        pairs += [(ours.experts.down.weight, theirs.fc1_latent_proj.weight)]
        pairs += [(ours.experts.up.weight, theirs.fc2_latent_proj.weight)]
    with torch.no_grad():
        for own, other in pairs:
            own.copy_(other)
        x = torch.randn(2, 17, D, generator=generator, dtype=torch.float64).to(dtype)
        torch.testing.assert_close(ours(x)[0], theirs(x), rtol=0, atol=tolerance)
