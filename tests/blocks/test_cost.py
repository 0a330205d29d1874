"""What a composition costs, against closed formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import (
    cache_bytes,
    cache_bytes_per_token,
    count_parameters,
    forward_flops_per_token,
    in_order,
    training_flops_per_token,
)
from blockwright.blocks.experts import Experts
from blockwright.blocks.ffn import FFN, MoE
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.sample import alike, sampled
from blockwright.registry import register
from tests.blocks.small import Make, model

V, D, L = 61, 48, 2
MHA = {"attention": {"name": "mha", "n_heads": 4}, "position": "none"}
OF_MHA = 4 * D  # scores and averages, uncausal: 2·2·N·H a token and key


def ghost(config: Any) -> Any:
    return compose(config, device="meta")


def test_dense_and_tied_models_have_no_idle_parameters(tiny: Make) -> None:
    total = 2 * V * D + L * (D * (8 + 2 * 2 + 8) * 6 + 3 * D * 40 + 2 * D) + D
    for tied, saved in ((False, 0), (True, V * D)):
        counted = count_parameters(ghost(tiny(tie_embeddings=tied)))
        assert (counted.total, counted.active, counted.embedding) == (total - saved, total - saved, V * D)


@pytest.mark.parametrize(("n_experts", "top_k"), [(6, 2), (4, 4), (5, 1)])
def test_active_parameters_take_k_of_the_routed_experts_and_all_of_the_rest(
    tiny: Make, n_experts: int, top_k: int
) -> None:
    config = tiny(moe=True, n_layers=3)
    config["ffn"]["n_experts"], config["gating"]["top_k"] = n_experts, top_k
    counted, one_expert = count_parameters(ghost(config)), 3 * D * 12
    assert counted.total - counted.active == 2 * (n_experts - top_k) * one_expert  # two mixtures
    dense = count_parameters(ghost(tiny(n_layers=3, ffn={"name": "swiglu", "d_ff": 40})))
    router, shared = D * n_experts, 3 * D * 20
    assert counted.total == dense.total + 2 * (n_experts * one_expert + router + shared - 3 * D * 40)
    chosen = count_parameters(ghost({**config, "gating": {"name": "expert_choice", "top_k": top_k}}))
    assert chosen.active == counted.active  # experts that choose tokens are visited top_k times on average


@pytest.mark.parametrize("length", [1, 63])
def test_flops_of_a_dense_model_are_twice_its_matrices_and_the_attention(tiny: Make, length: int) -> None:
    matrices = L * (4 * D * D + 3 * D * 40) + V * D
    assert forward_flops_per_token(tiny(**MHA), length) == 2 * matrices + L * OF_MHA * length


@pytest.mark.parametrize(("keys", "values"), [(20, 8), (12, 5)])
def test_attention_costs_products_with_keys_and_values_and_none_with_padding(
    tiny: Make, keys: int, values: int
) -> None:
    """2·T·N·(keys + values) a token in the forward pass, whatever their widths; and so much is what trains here."""
    mla = {"name": "mla", "n_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": values}
    config, T = tiny(attention={**mla, "qk_nope_head_dim": keys - 4}, position="none"), 128
    decoder = compose(config).train()
    linear = 2 * sum(p.numel() for n, p in decoder.named_parameters() if p.ndim == 2 and "embedding" not in n)
    assert forward_flops_per_token(config, T) == linear + L * 2 * T * 4 * (keys + values)
    with FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, T, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() / T == pytest.approx(training_flops_per_token(config, T), rel=5e-3)


@pytest.mark.parametrize(
    "wrapped", [{}, {"experts": {"name": "latent", "width": 8, "experts": {"name": "swiglu", "d_ff": 12}}}]
)
def test_flops_of_a_mixture_are_those_of_its_active_parameters(tiny: Make, wrapped: dict[str, Any]) -> None:
    config = tiny(moe=True, **MHA, **wrapped)
    counted = count_parameters(ghost(config))
    matrices = counted.active - counted.embedding - (2 * L + 1) * D
    assert forward_flops_per_token(config, 16) == 2 * matrices + L * OF_MHA * 16


@pytest.mark.parametrize("residual", registry.names("residual"))
def test_forward_flops_are_those_of_a_pass_outside_of_training(tiny: Make, residual: str) -> None:
    """``mixture_of_depths`` feeds few tokens in training, and all outside of it."""
    model = tiny(ffn={"name": "swiglu", "d_ff": 80}, residual=residual)
    decoder = compose(model, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(torch.zeros(1, 24, dtype=torch.long, device="meta"))
    assert forward_flops_per_token(model, 24) == pytest.approx(counter.get_total_flops() / 24)


def test_multi_token_prediction_costs_a_layer_a_projection_and_the_head_for_each_depth(tiny: Make) -> None:
    """Depth k has length − k tokens; of two tokens only the first depth has any."""

    def of_depth(k: int, length: int) -> float:
        deeper, model = (forward_flops_per_token(tiny(n_layers=n), length - k) for n in (L + 1, L))
        return (length - k) * (deeper - model + 2 * 2 * D * D + 2 * V * D)

    for length in (2, 9):
        without, trained = (training_flops_per_token(tiny(mtp=mtp), length) for mtp in (None, {"depth": 2}))
        assert without == 3 * forward_flops_per_token(tiny(), length)
        expected = 3 * sum(of_depth(k, length) for k in (1, 2) if k < length) / length
        assert trained - without == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe": True, "mtp": {"depth": 1}, "gating": {"name": "expert_choice", "top_k": 2}},
        {"loop": {"name": "cycle", "visits": 3, "exit": {"name": "gate"}}, "n_layers": 1},
    ],
    ids=["mixture", "loop"],
)
def test_a_model_costs_what_it_costs_wherever_its_weights_are(tiny: Make, changes: dict[str, Any]) -> None:
    held, without = compose(tiny(**changes)), ghost(tiny(**changes))
    for made in (held, sampled(held)):
        assert forward_flops_per_token(made, 9) == forward_flops_per_token(without, 9)
        assert training_flops_per_token(made, 9) == training_flops_per_token(without, 9)
        assert count_parameters(made) == count_parameters(without)
        assert cache_bytes(made, 9, torch.float32) == cache_bytes(without, 9, torch.float32)


def test_costing_allocates_no_weights(tiny: Make) -> None:
    decoder = ghost(tiny(moe=True, d_model=2**16, vocab_size=2**20))  # a terabyte, were it made
    assert count_parameters(decoder).total > 1e11 and all(p.is_meta for p in decoder.parameters())
    assert sum(c.nbytes for c in decoder.new_caches(1, 1)) == L * 2 * 2 * (2**16 // 8) * 4


class ScaledMoE(MoE):
    """A mixture with a parameter of its own."""

    def __init__(
        self, d_model: int, gating: Gating, experts: Experts, n_experts: int = 8, shared: FFN | None = None
    ) -> None:
        super().__init__(gating, experts, n_experts, shared)
        self.gain = nn.Parameter(torch.empty(d_model))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"position": "learned"}, {"moe": True}], ids=str)
def test_families_share_out_every_parameter(temporary_blocks: None, tiny: Make, changes: dict[str, Any]) -> None:
    decoder = ghost(tiny(**changes))
    families = count_parameters(decoder).families
    assert list(families) == in_order([])
    assert sum(families.values()) == sum(p.numel() for p in decoder.parameters())
    assert families["other"] == families["mtp"] == 0 and families["norms"] == (2 * L + 1) * D
    assert families["head"] == (0 if changes.get("tie_embeddings") else V * D)
    assert families["position"] == (64 * D if changes.get("position") else 0)
    if "moe" in changes:  # what a mixture holds besides its parts
        register("ffn", "scaled_moe")(ScaledMoE)
        config = tiny(moe=True)
        config["ffn"]["name"] = "scaled_moe"
        assert count_parameters(ghost(config)).families == {**families, "other": D}


@pytest.mark.parametrize(
    "patch", [{"attention": {"n_kv_heads": 1}}, {"experts": {"d_ff": 16}}, {"position": {"theta": 500.0}}], ids=str
)
def test_layers_are_alike_when_neither_shapes_nor_settings_tell_them_apart(tiny: Make, patch: dict[str, Any]) -> None:
    config = tiny(moe=True, n_layers=5, overrides=[{"layers": -1, **patch}])
    assert alike(ghost(config).layers) == [[0], [1, 2, 3], [4]]


def test_block_that_two_layers_share_counts_once(tiny: Make) -> None:
    decoder = ghost(tiny())
    apart = count_parameters(decoder)
    decoder.layers[1].attention = decoder.layers[0].attention
    shared = count_parameters(decoder)
    assert 2 * shared.families["attention"] == apart.families["attention"]
    assert shared.total == sum(p.numel() for p in decoder.parameters())


def test_kv_heads_save_cache_and_projections_but_no_attention_flops_in_the_layers_that_have_fewer(tiny: Make) -> None:
    config = tiny(n_layers=3, position="none", attention={"name": "gqa", "n_heads": 4, "n_kv_heads": 4})
    for heads in (1, 2):
        mixed = {**config, "overrides": [{"layers": 1, "attention": {"n_kv_heads": heads}}]}
        saved = forward_flops_per_token(config, 32) - forward_flops_per_token(mixed, 32)
        assert saved == 2 * 2 * D * (4 - heads) * 12  # keys and values
        sizes = [cache_bytes(ghost(c), 10, torch.bfloat16) for c in (config, mixed)]
        assert sizes[0] - sizes[1] == 10 * 2 * (4 - heads) * 12 * 2


def test_full_windows_and_states_weigh_less_the_longer_the_sequence_is(tiny: Make) -> None:
    def weigh(length: int, **attention: Any) -> float:
        decoder = ghost(tiny(attention={"n_heads": 4, **attention}, position="none"))
        return cache_bytes_per_token(decoder, length, torch.bfloat16)

    a_token = L * 2 * 2 * 12 * 2  # layers × keys and values × heads × width × bytes
    full, window = {"name": "gqa", "n_kv_heads": 2}, {"name": "sliding_window", "n_kv_heads": 2, "window": 8}
    assert [weigh(length, **full) for length in (1, 8, 32)] == [a_token] * 3
    assert [weigh(length, **window) for length in (4, 8, 32)] == [a_token, a_token, a_token / 4]
    state = 8 * weigh(8, name="gated_delta")
    assert state > 0 and weigh(32, name="gated_delta") == state / 32


def test_streams_cost_their_projection_and_mixing() -> None:
    plain, mhc, hyper, sources = (
        ghost(model(n_layers=3, residual=residual))
        for residual in ("prenorm", "mhc", "hyper_connections", {"name": "attention_residual", "block": 4})
    )
    size, flops = count_parameters(plain).total, forward_flops_per_token(plain, 8)
    rows = 2 * 4 + 24  # read, write and a logit for each permutation, of four streams
    assert count_parameters(mhc).total - size == 6 * (rows * 4 * D + rows + 3)
    assert forward_flops_per_token(mhc, 8) - flops == 6 * 2 * (rows * 4 * D + 24 * 16 + 4 * 4 * D)
    assert count_parameters(hyper).total - size == 6 * (6 * D + 4 * 6 + 2 + D)
    assert forward_flops_per_token(hyper, 8) - flops == 6 * 2 * (4 * 6 * D + 5 * 4 * D)
    assert count_parameters(sources).total - size == 6 * D  # no query of the first attention, one at the end
    assert forward_flops_per_token(sources, 8) == flops  # like those of norms, elementwise operations are not counted
