"""Whole models against transformers': random weights copied by name, logits compared.

Checkpoints of known families are compared in test_parity.py; here are models that no family of them describes (GPT-J,
MPT, GLM-4), and the two pairings of rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.deepseek_like import NAMES
from blockwright.plugins.hub.llama_like import ATTENTION, EXPERTS, FRAME, LAYER, PRENORM
from blockwright.plugins.hub.names import Row, links, one_of

V, D, T = 97, 40, 63

# --- our names ↔ theirs -----------------------------------------------------------------------------------------------


# In memory transformers keeps the experts of a layer in two tensors, as we do; on disk they are apart.
STACKED = (
    Row("layers.{i}.ffn.experts.gate_up", "model.layers.{i}.mlp.experts.gate_up_proj"),
    Row("layers.{i}.ffn.experts.down", "model.layers.{i}.mlp.experts.down_proj"),
)
DEEPSEEK = (*(row for row in NAMES if row not in EXPERTS), *STACKED)
GLM4 = (
    *(*FRAME, *PRENORM, *ATTENTION),
    Row("layers.{i}.residual.attention_out_norm.weight", LAYER + "post_self_attn_layernorm.weight"),
    Row("layers.{i}.residual.ffn_out_norm.weight", LAYER + "post_mlp_layernorm.weight"),
    Row("layers.{i}.ffn.gate.weight", LAYER + "mlp.gate_up_proj.weight", form=one_of(2, 0)),
    Row("layers.{i}.ffn.up.weight", LAYER + "mlp.gate_up_proj.weight", form=one_of(2, 1)),
    Row("layers.{i}.ffn.down.weight", LAYER + "mlp.down_proj.weight"),
)
GPTJ = (
    Row("embedding.weight", "transformer.wte.weight"),
    Row("norm.*", "transformer.ln_f.*"),
    Row("head.weight", "lm_head.weight"),
    Row("layers.{i}.residual.attention_norm.*", "transformer.h.{i}.ln_1.*"),
    *(
        Row(f"layers.{{i}}.attention.{our}.weight", f"transformer.h.{{i}}.attn.{their}_proj.weight")
        for our, their in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out"))
    ),
    Row("layers.{i}.ffn.up.*", "transformer.h.{i}.mlp.fc_in.*"),
    Row("layers.{i}.ffn.down.*", "transformer.h.{i}.mlp.fc_out.*"),
)
MPT = (
    Row("embedding.weight", "transformer.wte.weight"),
    Row("norm.weight", "transformer.norm_f.weight"),
    Row("layers.{i}.residual.attention_norm.weight", "transformer.blocks.{i}.norm_1.weight"),
    Row("layers.{i}.residual.ffn_norm.weight", "transformer.blocks.{i}.norm_2.weight"),
    *(
        Row(f"layers.{{i}}.attention.{name}.weight", "transformer.blocks.{i}.attn.Wqkv.weight", form=one_of(3, n))
        for n, name in enumerate(("query", "key", "value"))
    ),
    Row("layers.{i}.attention.output.weight", "transformer.blocks.{i}.attn.out_proj.weight"),
    *(Row(f"layers.{{i}}.ffn.{m}.weight", f"transformer.blocks.{{i}}.ffn.{m}_proj.weight") for m in ("up", "down")),
)


def copy_weights(theirs: nn.Module, ours: Decoder, table: tuple[Row, ...], spare: set[str]) -> None:
    """Every one of our tensors from the one of that name, and none of theirs left over but ``spare``."""
    weights, own = theirs.state_dict(), ours.state_dict()
    used = set()
    for link in links(table, own, len(ours.layers)):
        link.part(own[link.ours]).copy_(link.row.form.view(weights[link.theirs]))
        used.add(link.theirs)
    assert set(weights) - used <= spare


# --- the models -------------------------------------------------------------------------------------------------------

OUR_ROPE = {"name": "rope", "theta": 500.0, "pairing": "interleaved"}
THEIR_ROPE = {"rope_type": "default", "rope_theta": 500.0}
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 5}
MLA = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 9}


def ours(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": V,
        "d_model": D,
        "n_layers": 3,
        "max_positions": 64,
        "norm": {"name": "rmsnorm", "eps": 1e-5},
        "residual": "prenorm",
        **changes,
    }


def mixture(gating: dict[str, Any], shared: Any = None) -> dict[str, Any]:
    return {
        "ffn": {"name": "moe", "n_experts": 8, "shared": shared},
        "gating": {"top_k": 3, **gating},
        "experts": {"name": "swiglu", "d_ff": 13},
    }


def deepseek_v3() -> tuple:
    config = transformers.DeepseekV3Config(
        **SIZES,
        **MLA,
        num_key_value_heads=5,
        q_lora_rank=13,
        intermediate_size=37,
        moe_intermediate_size=13,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        rope_parameters=THEIR_ROPE,
    )
    gate = {"name": "sigmoid_bias", "n_groups": 4, "top_groups": 2, "scaling": 2.5}
    mine = ours(**deepseek(mixture(gate, {"name": "swiglu", "d_ff": 13})))
    return transformers.DeepseekV3ForCausalLM, config, mine, DEEPSEEK


def deepseek(moe: dict[str, Any]) -> dict[str, Any]:
    latent = {"name": "rmsnorm", "eps": 1e-6}  # hard-coded there
    attention = {"name": "mla", "n_heads": 5, "q_lora_rank": 13, **MLA}
    return {
        **moe,
        "attention": {**attention, "q_norm": latent, "kv_norm": latent},
        "position": OUR_ROPE,
        "variants": {"ffn": {"dense": {"name": "swiglu", "d_ff": 37}}},
        "layout": {"ffn": "dense*1 ffn*"},
    }


def gptj() -> tuple:
    config = transformers.GPTJConfig(
        vocab_size=V, n_embd=D, n_layer=3, n_head=5, n_positions=64, rotary_dim=4, n_inner=37, tie_word_embeddings=False
    )
    mine = ours(
        attention={"name": "mha", "n_heads": 5},
        position={"name": "rope", "rotary_fraction": 0.5, "pairing": "interleaved"},
        ffn={"name": "gelu", "d_ff": 37, "bias": True},
        norm={"name": "layernorm", "eps": 1e-5},
        residual="parallel",
    )
    return transformers.GPTJForCausalLM, config, mine, GPTJ


def mpt() -> tuple:
    config = transformers.MptConfig(d_model=D, n_heads=4, n_layers=3, vocab_size=V, max_seq_len=64)
    mine = ours(
        attention={"name": "mha", "n_heads": 4},
        position="alibi",
        ffn={"name": "gelu", "approximate": "none"},
        norm={"name": "layernorm", "eps": 1e-5, "bias": False},
        tie_embeddings=True,
    )
    return transformers.MptForCausalLM, config, mine, MPT


def glm4() -> tuple:
    config = transformers.Glm4Config(
        **SIZES,
        num_key_value_heads=1,
        head_dim=12,
        intermediate_size=37,
        attention_bias=False,
        rms_norm_eps=1e-5,
        rope_parameters={**THEIR_ROPE, "partial_rotary_factor": 0.5},
        pad_token_id=0,
        eos_token_id=0,
    )
    mine = ours(
        attention={"name": "gqa", "n_heads": 5, "n_kv_heads": 1, "head_dim": 12},
        position={**OUR_ROPE, "rotary_fraction": 0.5},
        ffn={"name": "swiglu", "d_ff": 37},
        residual="sandwich",
    )
    return transformers.Glm4ForCausalLM, config, mine, GLM4


MODELS: dict[str, Callable[[], tuple]] = {"gptj": gptj, "mpt": mpt, "glm4": glm4, "deepseek_v3": deepseek_v3}
SPARE = {"lm_head.weight", "lm_head.bias"}  # tied, or zero


def pair(name: str, randomise: Callable[..., None], dtype: torch.dtype) -> tuple[nn.Module, Decoder]:
    """transformers' model with random weights, and ours with the same."""
    cls, config, mine, table = MODELS[name]()
    config._experts_implementation = "eager"  # the others refuse doubles
    theirs = cls(config).to(dtype).eval()
    randomise(theirs)
    with torch.no_grad():
        if isinstance(getattr(theirs.get_output_embeddings(), "bias", None), Tensor):
            theirs.lm_head.bias.zero_()
        for buffer_name, buffer in theirs.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
        decoder = compose(mine).to(dtype).eval()
        copy_weights(theirs, decoder, table, SPARE)
    return theirs, decoder


def tokens() -> Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["gptj", "mpt", "glm4"])
@torch.no_grad()
def test_logits_equal_transformers_in_single_precision(name: str, randomise: Callable[..., None]) -> None:
    theirs, decoder = pair(name, randomise, torch.float32)
    expected = theirs(tokens()).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(decoder(tokens()), expected, rtol=0, atol=2e-5)


def test_half_split_and_interleaved_checkpoints_differ_by_a_permutation_of_rows(randomise: Callable[..., None]) -> None:
    """The switch of transformers' deepseek_v3, against our two pairings."""
    theirs, decoder = pair("deepseek_v3", randomise, torch.float32)
    split = compose({**decoder.config, "position": {**OUR_ROPE, "pairing": "half_split"}})
    split.load_state_dict(decoder.state_dict())
    theirs.config.rope_interleave = False
    torch.testing.assert_close(split(tokens()), theirs(tokens()).logits, rtol=0, atol=2e-5)
    assert (split(tokens()) - decoder(tokens())).abs().max() > 0.01
    p = [*range(0, 6, 2), *range(1, 6, 2)]
    with torch.no_grad():
        for layer in split.layers:
            queries, keys = layer.attention.query[2].weight.view(5, 14, 13), layer.attention.kv_down.weight
            queries[:, 8:] = queries[:, 8:][:, p]
            keys[12:] = keys[12:][p]
    torch.testing.assert_close(split(tokens()), decoder(tokens()), rtol=0, atol=1e-5)
