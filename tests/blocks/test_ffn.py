"""Mixtures of experts against a loop over tokens and choices, and those of other implementations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.ffn import rounded_width
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from tests.blocks.small import Make, drawn, near, order
from tests.blocks.test_formulas import EXPERTS as FORMULAS
from tests.blocks.test_formulas import by_token

EXPERTS = [n for n in registry.names("experts") if "d_ff" in registry.lookup("experts", n).schema.parameters]
T, D, E, K = 63, 48, 6, 3


def some_routing(spare: tuple[int, ...] = (), seed: int = 0) -> Routing:
    """Random choices that leave the ``spare`` experts without a token."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=generator)
    scores[:, list(spare)] = -1
    weights = torch.rand(T, K, generator=generator).requires_grad_()
    return Routing(scores.topk(K).indices, weights, torch.empty(0), {}, torch.empty(0))


SIZES = [(torch.float64, 12, D, 1e-11), (torch.float32, 12, D, 2e-5), (torch.float32, 7, 45, 2e-5)]


@pytest.mark.parametrize(("name", "size", "spare"), each(EXPERTS, SIZES, [(), (0,), (5,), (1, 2), (0, 2, 5)]), ids=str)
def test_output_and_gradients_equal_a_loop_over_tokens(
    make_block: Make, name: str, size: tuple[torch.dtype, int, int, float], spare: tuple[int, ...]
) -> None:
    dtype, d_ff, d_model, tolerance = size
    block = make_block("experts", {"name": name, "d_ff": d_ff}, n_experts=E, dtype=dtype, d_model=d_model)
    route, x = some_routing(spare), (3 * drawn(T, d_model, dtype=dtype)).requires_grad_()  # so far that the clamp cuts
    y, expected = block(x, route), by_token(FORMULAS[name], block, x, route)
    near(y, expected, 10 * tolerance)
    learning, cotangent = (x, route.weights, *block.parameters()), drawn(*y.shape, dtype=dtype, seed=1)
    found, right, again = (torch.autograd.grad(z, learning, cotangent) for z in (y, expected, block(x, route)))
    near(found, right, 30 * tolerance, 1e-4)
    assert all(map(torch.equal, found, again))  # bit for bit
    assert all((g[e] == 0).all() == (e in spare) for g in found[2:] for e in range(E))


@pytest.mark.parametrize("name", EXPERTS)
def test_half_precision_and_autocast_stay_near(make_block: Make, name: str) -> None:
    half, double, block = (
        make_block("experts", {"name": name, "d_ff": 12}, n_experts=E, dtype=dtype)
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    x, route = drawn(T, D).bfloat16(), some_routing()
    y, expected = half(x, route), double.double()(x.double(), route)
    assert y.dtype == torch.bfloat16 and (y.double() - expected).norm() < 2e-2 * expected.norm()
    plain = block(x.float(), route)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x.float(), route)
    assert y.dtype == torch.bfloat16 and (y.float() - plain).norm() < 2e-2 * plain.norm()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize(
    ("gate", "shared"),
    each(registry.names("gating"), [None, {"name": "swiglu", "d_ff": 20}, {"name": "gelu", "d_ff": 5}]),
    ids=str,
)
def test_moe_is_shared_plus_weighted_experts_of_any_gate(make_block: Make, gate: str, shared: Any) -> None:
    scaled = {"scaling": 2.0} if "scaling" in registry.lookup("gating", gate).schema.parameters else {}
    around = {"gating": {"name": gate, "top_k": 3, **scaled}, "experts": {"name": "swiglu", "d_ff": 12}}
    moe, x = make_block("ffn", {"name": "moe", "n_experts": 8, "shared": shared}, around=around), drawn(3, 21, 48)
    ids, flat = torch.arange(63).view(3, 21) % 61, x.flatten(0, 1)
    y, routing = moe(x, Pass(order(21), tokens=ids))
    assert len(routing.experts) == 63 and routing.load.shape == (8,) and routing.load.sum() > 150
    chosen = moe.gating(x, ids)
    for t in (0, 17, 62):
        expected = torch.zeros(48, dtype=torch.float64) if shared is None else moe.shared(flat[t])[0]
        for e, w in zip(chosen.experts[t], chosen.weights[t], strict=True):
            if e < 8:  # no expert
                g, u = moe.experts.gate_up[e].chunk(2)
                expected = expected + w * (moe.experts.down[e] @ (F.silu(g @ flat[t]) * (u @ flat[t])))
        near(y.flatten(0, 1)[t], expected, 1e-6)


def test_rounding_goes_up_to_a_multiple() -> None:
    assert [rounded_width(x) for x in (1, 64, 64.1, 8 * 4096 / 3)] == [64, 64, 128, 10944]
    assert rounded_width(10, multiple=4) == 12


@pytest.mark.parametrize(
    ("latent", "dtype", "tolerance"),
    [(11, torch.float32, 1e-5), (11, torch.float64, 1e-10), (None, torch.float64, 1e-10)],
)
def test_latent_mixture_is_that_of_nemotron(
    make_block: Make, latent: int | None, dtype: torch.dtype, tolerance: float
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
        near(ours(x)[0], theirs(x), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)], ids=str)
def test_experts_beside_a_dense_network_are_those_of_gemma4(
    make_block: Make, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextDecoderLayer

    def normed(norm: Any, x: Tensor) -> Tensor:  # theirs computes in fp32
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        return y * norm.weight if norm.with_scale else y

    monkeypatch.setattr(Gemma4RMSNorm, "forward", normed)
    sizes = {"hidden_size": 48, "intermediate_size": 20, "hidden_size_per_layer_input": 0}
    experts = {"enable_moe_block": True, "num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 13}
    config = Gemma4TextConfig(**sizes, **experts, num_hidden_layers=2, attn_implementation="eager")
    theirs = Gemma4TextDecoderLayer(config, 0).to(dtype)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    for norm in (m for m in theirs.modules() if getattr(m, "with_scale", False)):
        nn.init.normal_(norm.weight, 1.0, 0.3)
    router: Any = theirs.router  # ours is single behind its norm
    router.proj.float().register_forward_pre_hook(lambda module, given: (given[0].float(),))
    router.per_expert_scale.data = router.per_expert_scale.float()
    inside = {"name": "moe", "n_experts": 7, "expert_norm": "rmsnorm"}
    node = {"name": "side_by_side", "dense": {"name": "geglu", "d_ff": 20}, "sparse": inside}
    around = {"gating": {"name": "normed_softmax", "top_k": 3}, "experts": {"name": "geglu", "d_ff": 13}}
    ours = make_block("ffn", node, dtype=dtype, around={**around, "norm": "rmsnorm"})
    pairs = [
        *((getattr(ours.dense, name), getattr(theirs.mlp, f"{name}_proj")) for name in ("gate", "up", "down")),
        (ours.dense_norm, theirs.pre_feedforward_layernorm),
        (ours.dense_out_norm, theirs.post_feedforward_layernorm_1),
        (ours.sparse.expert_norm, theirs.pre_feedforward_layernorm_2),
        (ours.sparse_out_norm, theirs.post_feedforward_layernorm_2),
    ]
    weights = [(a.weight, b.weight) for a, b in pairs]
    weights += [(ours.sparse.gating.weight, router.proj.weight), (ours.sparse.gating.norm.weight, router.scale)]
    weights += [(ours.sparse.gating.gain, router.per_expert_scale)]
    weights += [(ours.sparse.experts.gate_up, theirs.experts.gate_up_proj)]
    weights += [(ours.sparse.experts.down, theirs.experts.down_proj)]
    for own, other in weights:
        own.data.copy_(other)
    x = drawn(2, 19, 48, dtype=dtype)
    # Their layer adds what is tested to the stream: without attention, and without the norm of the sum.
    nn.init.zeros_(theirs.self_attn.o_proj.weight)
    theirs.post_feedforward_layernorm = nn.Identity()
    angles = (torch.ones(1, 19, 256, dtype=dtype), torch.zeros(1, 19, 256, dtype=dtype))
    right = theirs(x, shared_kv_states={}, position_embeddings=angles, position_ids=torch.arange(19)[None]) - x
    found = ours(x)[0]
    near(found, right, tolerance)
    weigh = torch.randn_like(right)
    (right * weigh).sum().backward()
    (found * weigh).sum().backward()
    for own, other in weights:
        near(own.grad, other.grad.to(own.grad.dtype), 100 * tolerance, 1e-4)
