"""The presets against the published config.json: the same model, read from either.

The numbers below are those of the released files, reduced to four layers on both sides.
"""

from __future__ import annotations

from typing import Any

import pytest

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.exporting import recognise
from blockwright.plugins.hub.fingerprint import difference
from blockwright.plugins.hub.importing import find
from blockwright.registry import presets

LAYERS = 4
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None}
V2 = {
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "max_position_embeddings": 163840,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
LARGE = {
    "hidden_size": 5120,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}
SMALL = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
RELEASED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**V2, **LARGE, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek_v2_5": {**V2, **LARGE, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v2_lite": {**V2, **SMALL, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek_v3": {
        **V2,
        **LARGE,
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "vocab_size": 129280,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "deepseek_moe_16b": {
        **{k: v for k, v in {**V2, **SMALL}.items() if not k.endswith(("_rank", "_head_dim", "_group", "_method"))},
        "model_type": "deepseek",
        "max_position_embeddings": 4096,
        "routed_scaling_factor": None,
    },
    "llama2_70b": {
        **LLAMA,
        "vocab_size": 32000,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "llama3_1_8b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_type": "llama3",
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral_7b": {
        **LLAMA,
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "attention_bias": False,
        "sliding_window": None,
        "max_window_layers": 48,
    },
    "olmoe_1b_7b": {
        **LLAMA,
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "clip_qkv": None,
        "max_position_embeddings": 4096,
        "router_aux_loss_coef": 0.01,
    },
    "gpt_oss_20b": {
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "max_position_embeddings": 131072,
        "rope_scaling": {**YARN, "rope_type": "yarn", "factor": 32.0, "truncate": False},
    },
}
RELEASED["deepseek_v3_2"] = {
    **RELEASED["deepseek_v3"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
RELEASED["deepseek_v4_flash"] = {
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**YARN, "factor": 16, "original_max_position_embeddings": 65536},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
RELEASED["deepseek_v4_pro"] = {
    **RELEASED["deepseek_v4_flash"],
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}
NOT_WRITTEN = {"tiny", "tiny_recall"}  # rotary positions in halves with latent attention; interleaved ones without
WRITTEN_AS = {
    "ablation_moe_mha": "deepseek",
    "deepseek_moe_16b": "deepseek",
    "deepseek_vl2": "deepseek_vl_v2",
    "deepseek_vl2_tiny_language": "deepseek",
    "deepseek_vl2_small_language": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v3_2": "deepseek_v32",
    "deepseek_v4": "deepseek_v4",
    "deepseek_vl2_base_language": "deepseek_v3",
    "deepseek_7b": "llama",
    "deepseek_67b": "llama",
    "deepseek": "deepseek_v2",
    "ablation_7b": "llama",
    "gemma2": "gemma2",
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "qwen3": "qwen3",
    "qwen3_next": "qwen3_next",
    "olmo_hybrid": "olmo_hybrid",
    "kimi_linear": "kimi_linear",
    "nemotron_h": "nemotron_h",
    "smollm3": "smollm3",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "glm4_5": "glm4_moe",
    "minimax_m2": "minimax_m2",
    "apertus": "apertus",
    "qwen3_30b": "qwen3_moe",
}


GEMMA4_E = {
    "attention": "attention full attention full",
    "values": "values*2 none*2",
    "kv_source": "lent*2 borrowed*2",
}
# patterns that do not fit four layers
SHORT = {
    "gemma3_27b": {"attention": "attention*3 full"},
    "gemma4_31b": {"attention": "attention*3 full"},
    "gemma4_e2b": GEMMA4_E,
    "gemma4_e4b": GEMMA4_E,
    "deepseek_v4_flash": {"attention": "near*2 attention hca", "gating": "hash*3 gating"},
    "deepseek_v4_pro": {"attention": "hca*2 attention hca", "gating": "hash*3 gating"},
    "kimi_linear_48b_a3b": {"attention": "linear*3 attention", "ffn": "dense*1 ffn*"},
    "nemotron_h_8b": {
        "attention": "attention full none attention",
        "ffn": "none*2 ffn none",
        "residual": "residual*2 mlp residual",
    },
}


def preset(name: str) -> Decoder:
    """A preset with four layers, on the meta device."""
    model = {"vocab_size": 256, **presets.read(name), "n_layers": LAYERS}
    return compose({**model, "layout": SHORT.get(name, model.get("layout"))}, device="meta")


@pytest.mark.parametrize("name", RELEASED)
def test_published_config_describes_the_preset(name: str) -> None:
    values = {**RELEASED[name], "num_hidden_layers": LAYERS}
    assert difference(preset(name), compose(find(values).composition(values), device="meta")) is None


@pytest.mark.parametrize("name", sorted(presets.names()))
def test_every_published_preset_is_exported_under_its_name(name: str) -> None:
    family, _, why = recognise(preset(name), None, {})
    known = max((prefix for prefix in WRITTEN_AS if name.startswith(prefix)), key=len, default=None)
    assert (family.model_type, why) == (WRITTEN_AS[known], None) if known else name in NOT_WRITTEN
