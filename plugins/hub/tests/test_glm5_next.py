"""GLM-5.3-Flash's language model against transformers' class of it, which has no head and no family here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_models import filled
from torch import Tensor, nn
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import count_parameters
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.families.qwen_hybrid import channels, fused
from blockwright.plugins.hub.hybrid_like import DELTA
from blockwright.plugins.hub.names import Row, beside

V, D, EPS = 61, 48, 0.01
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "pad_token_id": None,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 6,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "v_head_dim": 6,
    "qk_nope_head_dim": 7,
    "num_experts_per_tok": 2,
    "index_topk": 8,
    "index_kpool": 4,
    "index_head_dim": 10,
    "index_n_heads": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "rms_norm_eps": EPS,
    "swiglu_limit": 1.5,
    "max_position_embeddings": 64,
}
OURS: dict[str, Any] = {
    "vocab_size": V,
    "d_model": D,
    "n_layers": 5,
    "max_positions": 64,
    "norm": {"eps": EPS},
    "residual": {"norm_eps": EPS},
    "attention": {
        "n_heads": 3,
        "kv_lora_rank": 10,
        "q_lora_rank": 14,
        "qk_nope_head_dim": 7,
        "v_head_dim": 6,
        "selector": {"n_heads": 16, "head_dim": 10, "block_size": 4, "top_k": 2},
    },
    "ffn": {"n_experts": 6, "shared": {"d_ff": 20, "limit": 1.5}},
    "gating": {"top_k": 2},
    "experts": {"d_ff": 20, "limit": 1.5},
    "variants": {
        "attention": {"linear": {"n_heads": 4, "head_dim": 8}},
        "ffn": {"dense": {"d_ff": 40, "limit": 1.5}},
    },
    "layout": {"attention": "linear*3 attention linear"},
}
A, T, INDEX = "layers.{i}.attention.", "layers.{i}.self_attn.", "layers.{i}.self_attn.indexer."
DELTA_RULE = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "strength": "b_proj",
    "output": "o_proj",
    "decay.down": "forget_gate.f_a_proj",
    "decay.up": "forget_gate.f_b_proj",
    "norm": "o_norm",
    "output_gate.down": "g_a_proj",
    "output_gate.up": "g_b_proj",
}
LATENT = {
    "query.0": "q_a_proj",
    "query.1": "q_a_layernorm",
    "query.2": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "output": "o_proj",
    "selector.query": "indexer.wq_b",
    "selector.key": "indexer.wk",
    "selector.weights": "indexer.weights_proj",
}


def table(decoder: Decoder) -> list[Row]:
    F, M, R = "layers.{i}.ffn.", "layers.{i}.mlp.", "layers.{i}.residual."
    rows = [Row("embedding.weight", "embed_tokens.weight"), Row("norm.weight", "norm.weight")]
    rows += beside(DELTA, [Row(f"{A}{our}.weight", f"{T}{their}.weight") for our, their in DELTA_RULE.items()])
    rows += beside("!" + DELTA, [Row(f"{A}{our}.weight", f"{T}{their}.weight") for our, their in LATENT.items()])
    convolution = fused(channels(decoder), T + "conv1d.weight", "_conv.weight", taps=True)
    rows += beside(DELTA, convolution)
    rows += [Row(DELTA, T + "forget_gate.A_log"), Row(A + "decay.bias", T + "forget_gate.dt_bias")]
    rows += [
        Row(A + "selector.k_norm.*", INDEX + "k_norm.*"),
        Row(A + "selector.place", INDEX + "index_kpool_compress_ape"),
    ]
    rows.append(Row(A + "selector.gate.weight", INDEX + "index_kpool_compress_gate"))
    rows += [Row(f"{F}{m}.weight", f"{M}{m}_proj.weight") for m in ("gate", "up", "down")]
    rows += [Row(f"{F}shared.{m}.weight", f"{M}shared_experts.{m}_proj.weight") for m in ("gate", "up", "down")]
    rows += [Row(f"{F}experts.gate_up", f"{M}experts.gate_up_proj"), Row(f"{F}experts.down", f"{M}experts.down_proj")]
    rows += [Row(F + "gating.weight", M + "gate.weight"), Row(F + "gating.bias", M + "gate.e_score_correction_bias")]
    rows += [Row(F + "gating.moved", "")]
    for ours, theirs, norm in (("attention", "attn", "input"), ("ffn", "ffn", "post_attention")):
        rows.append(Row(f"{R}{ours}_norm.weight", f"layers.{{i}}.{norm}_layernorm.weight"))
        parts = (("weight", "fn"), ("bias", "base"), ("scale", "scale"))
        rows += [Row(f"{R}{ours}_connection.{our}", f"layers.{{i}}.{theirs}_hc.{their}") for our, their in parts]
    return rows


@pytest.fixture(scope="module")
def both(randomise: Callable[..., None]) -> tuple[nn.Module, Decoder]:
    config = Glm5NextTextConfig(**SMALL)
    config._experts_implementation = "eager"
    theirs = Glm5NextTextModel(config).eval()
    randomise(theirs)
    decoder = compose(preset("glm_5_3_flash", OURS)).eval()
    assert not filled(decoder, table(decoder), theirs)
    return theirs, decoder


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(V, (2, 33), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_last_states_equal_those_of_transformers(both: Any, ids: Tensor) -> None:
    theirs, decoder = both
    expected = theirs(ids).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(decoder.hidden(ids)[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_same_states(both: Any, ids: Tensor) -> None:
    theirs, decoder = both
    expected, caches = theirs(ids).last_hidden_state @ decoder.head.weight.T, decoder.new_caches(2, 33)
    parts = [decoder(ids[:, a:b], caches=caches) for a, b in ((0, 9), (9, 10), *((t, t + 1) for t in range(10, 33)))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_preset_has_as_many_parameters_as_their_class() -> None:
    with torch.device("meta"):
        theirs = Glm5NextTextModel(Glm5NextTextConfig())
    head = 154_880 * 4096
    ours = compose(preset("glm_5_3_flash"), device="meta")
    assert count_parameters(ours).total == sum(p.numel() for p in theirs.parameters()) + head == 313_326_816_766
