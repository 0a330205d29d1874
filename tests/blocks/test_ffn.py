"""Feed-forward blocks against their formulas, and mixtures against a loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.ffn.base import FFN, rounded_width
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import ConfigError

AROUND: dict[str, Any] = {"gating": {"name": "softmax_topk", "top_k": 2}, "experts": {"name": "swiglu", "d_ff": 12}}
AROUND |= {"ffn": "swiglu"}  # in another feed-forward block
NAMES = [name for name in registry.names("ffn") if name != "none"]


@pytest.fixture(scope="module")
def make(make_block: Callable[..., Any]) -> Callable[..., FFN]:
    def build(
        node: Any, dtype: torch.dtype = torch.float64, around: dict[str, Any] | None = None, **context: Any
    ) -> FFN:
        return make_block("ffn", node, dtype=dtype, around={**AROUND, **(around or {})}, **context)

    return build


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 21, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# --- what every ffn promises ------------------------------------------------------------------------------------------


# --- dense ------------------------------------------------------------------------------------------------------------


def test_rounding_goes_up_to_a_multiple() -> None:
    assert [rounded_width(x) for x in (1, 64, 64.1, 8 * 4096 / 3)] == [64, 64, 128, 10944]
    assert rounded_width(10, multiple=4) == 12


@pytest.mark.parametrize("name", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("d_ff", [0, -1])
def test_width_below_one_is_refused_and_not_taken_for_the_default(
    make: Callable[..., FFN], name: str, d_ff: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        make({"name": name, "d_ff": d_ff})
    assert caught.value.path == "model.ffn.d_ff" and caught.value.value == d_ff


# --- mixture of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [None, {"name": "swiglu", "d_ff": 20}, {"name": "gelu", "d_ff": 5}], ids=str)
@pytest.mark.parametrize("gate", registry.names("gating"))
def test_moe_is_shared_plus_weighted_experts(make: Callable[..., FFN], gate: str, shared: Any) -> None:
    scaled = {"scaling": 2.0} if "scaling" in registry.lookup("gating", gate).schema.parameters else {}
    around = {"gating": {"name": gate, "top_k": 3, **scaled}}
    moe, x = make({"name": "moe", "n_experts": 8, "shared": shared}, around=around), tokens()
    ids = torch.arange(63).view(3, 21) % 61
    y, routing = moe(x, Pass(torch.arange(21)[None], tokens=ids))
    assert len(routing.experts) == 63 and routing.load.shape == (8,) and routing.load.sum() > 150
    flat = x.flatten(0, 1)
    probs = moe.gating(x, ids)
    for t in (0, 17, 62):
        expected = torch.zeros(48, dtype=torch.float64) if shared is None else moe.shared(flat[t])[0]
        for e, w in zip(probs.experts[t], probs.weights[t], strict=True):
            if e == 8:  # no expert
                continue
            g, u = moe.experts.gate_up[e].chunk(2)
            expected = expected + w * (moe.experts.down[e] @ (F.silu(g @ flat[t]) * (u @ flat[t])))
        torch.testing.assert_close(y.flatten(0, 1)[t], expected, rtol=0, atol=1e-6)


def test_two_shared_experts_are_one_of_their_summed_width(make: Callable[..., FFN]) -> None:
    wide = make({"name": "swiglu", "d_ff": 20})
    x = tokens()
    halves = [
        F.linear(F.silu(x @ wide.gate.weight[s].t()) * (x @ wide.up.weight[s].t()), wide.down.weight[:, s])
        for s in (slice(10), slice(10, 20))
    ]
    torch.testing.assert_close(wide(x)[0], sum(halves), rtol=0, atol=1e-12)


def test_segmented_experts_compute_what_the_whole_one_did(make: Callable[..., FFN]) -> None:
    """All of m = 4 quarter-width experts, each with weight 1, are the expert they were cut from."""
    whole, x = make({"name": "swiglu", "d_ff": 20}), tokens()
    gating = {"name": "softmax_topk", "top_k": 4}
    cut = make({"name": "moe", "n_experts": 4}, around={"gating": gating, "experts": {"name": "swiglu", "d_ff": 5}})
    with torch.no_grad():
        cut.gating.weight.zero_()  # all affinities 1/4
        gate, up = whole.gate.weight.view(4, 5, 48), whole.up.weight.view(4, 5, 48)
        cut.experts.gate_up.copy_(torch.cat((gate, up), 1))
        cut.experts.down.copy_(4 * whole.down.weight.view(48, 4, 5).transpose(0, 1))
    torch.testing.assert_close(cut(x)[0], whole(x)[0], rtol=0, atol=1e-12)


def test_moe_needs_its_children_and_says_which(make_block: Callable[..., Any]) -> None:
    for missing in ("gating", "experts"):
        around = {k: v for k, v in AROUND.items() if k != missing}
        with pytest.raises(ConfigError) as caught:
            make_block("ffn", "moe", around=around)
        assert caught.value.path == f"model.{missing}" and f"+model/{missing}=" in caught.value.remedy


def test_moe_tells_its_children_how_many_experts_there_are(make: Callable[..., FFN]) -> None:
    moe = make({"name": "moe", "n_experts": 5})
    assert moe.gating.weight.shape[0] == moe.experts.gate_up.shape[0] == 5


@pytest.mark.parametrize("n_experts", [0, -3])
def test_moe_without_experts_is_refused(make: Callable[..., FFN], n_experts: int) -> None:
    with pytest.raises(ConfigError) as caught:
        make({"name": "moe", "n_experts": n_experts})
    assert "n_experts" in f"{caught.value.path} {caught.value.rule}"


def test_moe_that_contains_itself_is_refused(make: Callable[..., FFN]) -> None:
    with pytest.raises(ConfigError, match="contain itself") as caught:
        make({"name": "moe", "shared": {"name": "moe"}})
    assert caught.value.path == "model.ffn.shared"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)], ids=str)
def test_experts_beside_a_dense_network_are_those_of_gemma4(
    make: Callable[..., FFN], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
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
    ours: Any = make(node, dtype, around={**around, "norm": "rmsnorm"})
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
    x = torch.randn(2, 19, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    # Their layer adds what is tested to the stream: without attention, and without the norm of the sum.
    nn.init.zeros_(theirs.self_attn.o_proj.weight)
    theirs.post_feedforward_layernorm = nn.Identity()
    angles = (torch.ones(1, 19, 256, dtype=dtype), torch.zeros(1, 19, 256, dtype=dtype))
    right = theirs(x, shared_kv_states={}, position_embeddings=angles, position_ids=torch.arange(19)[None]) - x
    found = ours(x)[0]
    torch.testing.assert_close(found, right, rtol=0, atol=tolerance)
    weigh = torch.randn_like(right)
    (right * weigh).sum().backward()
    (found * weigh).sum().backward()
    for own, other in weights:
        torch.testing.assert_close(own.grad, other.grad.to(own.grad.dtype), rtol=1e-4, atol=100 * tolerance)
