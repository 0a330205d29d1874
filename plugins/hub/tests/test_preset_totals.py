"""Presets of 2025 and 2026 against the classes of transformers: as many parameters, the same model at full depth."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers

from blockwright.blocks.compose import compose, preset
from blockwright.plugins.hub.fingerprint import difference
from blockwright.plugins.hub.importing import find

NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
KIMI = {
    "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
    "kda_layers": sorted({*range(1, 28)} - {4, 8, 12, 16, 20, 24, 27}),
}


def pattern(windows: int, times: int) -> list[str]:
    """Kinds of layers: some windows, one that is full, and so forth."""
    return [*["sliding_attention"] * windows, "full_attention"] * times


GEMMA4 = {"num_attention_heads": 8, "head_dim": 256, "global_head_dim": 512, "final_logit_softcapping": 30.0}
# preset → total, the class, and its settings where they are not the class's defaults
TOTALS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "kimi_linear_48b_a3b": (49_122_675_072, "KimiLinear", {"linear_attn_config": KIMI}),
    "qwen3_next_80b_a3b": (79_674_391_296, "Qwen3Next", {}),
    "qwen3_5_9b": (8_953_803_264, "Qwen3_5Text", {}),
    "qwen3_5_35b_a3b": (34_660_610_688, "Qwen3_5MoeText", {}),
    "glm_5": (743_911_199_232, "GlmMoeDsa", {}),
    "glm_5_2": (743_377_000_704, "GlmMoeDsa", {"index_topk_freq": 4, "index_skip_topk_offset": 3}),
    "ling_3_flash": (124_414_191_072, "BailingHybrid", {}),
    "longcat_flash": (560_664_958_976, "LongcatFlash", {}),
    "olmo_hybrid_7b": (7_430_870_688, "OlmoHybrid", {}),
    "smollm3_3b": (3_075_098_624, "SmolLM3", {}),
    "gemma3_27b": (
        27_009_346_304,
        "Gemma3",
        {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32}
        | {"num_key_value_heads": 16, "head_dim": 128},
    ),
    "gemma4_e2b": (
        4_628_569_344,
        "Gemma4",
        {**GEMMA4, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_key_value_heads": 1}
        | {"num_kv_shared_layers": 20, "use_double_wide_mlp": True, "layer_types": pattern(4, 7)},
    ),
    "gemma4_e4b": (
        7_463_013_376,
        "Gemma4",
        {**GEMMA4, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_key_value_heads": 2}
        | {"num_kv_shared_layers": 18, "layer_types": pattern(5, 7)},
    ),
    "gemma4_31b": (
        30_697_345_280,
        "Gemma4",
        {**GEMMA4, "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60, "num_attention_heads": 32}
        | {"num_key_value_heads": 16, "attention_k_eq_v": True, "num_global_key_value_heads": 4}
        | {"hidden_size_per_layer_input": 0, "sliding_window": 1024, "max_position_embeddings": 262144}
        | {"layer_types": pattern(5, 10)},
    ),
    "gemma4_26b_a4b": (
        25_233_141_760,
        "Gemma4",
        {**GEMMA4, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "attention_k_eq_v": True, "num_global_key_value_heads": 2}
        | {"hidden_size_per_layer_input": 0, "sliding_window": 1024, "max_position_embeddings": 262144}
        | {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
        | {"layer_types": pattern(5, 5)},
    ),
    "glm4_5_air": (106_852_245_504, "Glm4Moe", {"attention_bias": True, "head_dim": 128}),
    "deepseek_v3_2": (671_877_929_216, "DeepseekV32", {}),
    "deepseek_v4_flash": (284_332_230_231, "DeepseekV4", {"compress_ratios": [0, 0, *[4, 128] * 20, 4]}),
    "deepseek_v4_pro": (
        1_572_997_179_491,
        "DeepseekV4",
        {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 384}
        | {"moe_intermediate_size": 3072, "o_groups": 16, "q_lora_rank": 1536, "routed_scaling_factor": 2.5}
        | {"index_topk": 1024, "compress_ratios": [128, 128, *[4, 128] * 29, 4]},
    ),
    "inkling": (947_025_547_842, "Inkling", {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 64}),
    "minimax_m2": (228_689_748_992, "MiniMaxM2", {}),
    "apertus_8b": (8_053_338_176, "Apertus", {"num_key_value_heads": 8, "intermediate_size": 21504}),
    "nemotron_h_8b": (
        8_100_852_736,
        "NemotronH",
        {"hybrid_override_pattern": NEMOTRON, "num_hidden_layers": 52},
    ),
}


# A norm that all layers of theirs share is one of each layer here: numbers of its copies.
COPIED = {"gemma4_e2b": 34 * 256, "gemma4_e4b": 41 * 256}

# what the released files say beyond the class's defaults and the settings above
BEYOND: dict[str, dict[str, Any]] = {
    "qwen3_next_80b_a3b": {"max_position_embeddings": 262144, "rope_parameters": {"rope_theta": 1e7}},
    "qwen3_5_9b": {"max_position_embeddings": 262144, "rope_parameters": {"rope_theta": 1e7}},
    "qwen3_5_35b_a3b": {"max_position_embeddings": 262144, "rope_parameters": {"rope_theta": 1e7}},
    "glm_5": {"rope_parameters": {"rope_theta": 1e6}},
    "glm_5_2": {"max_position_embeddings": 1048576, "rope_parameters": {"rope_theta": 8e6}},
    "longcat_flash": {"initializer_range": 0.006},
    "olmo_hybrid_7b": {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
    "smollm3_3b": {"max_position_embeddings": 65536, "rope_parameters": {"rope_theta": 5e6}},
    "gemma3_27b": {
        "sliding_window": 1024,
        "query_pre_attn_scalar": 168,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "glm4_5_air": {"rope_parameters": {"rope_theta": 1e6}},
    "deepseek_v3_2": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
        | {"original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    },
    "deepseek_v4_flash": {"rope_parameters": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}},
    "deepseek_v4_pro": {"rope_parameters": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}},
    "inkling": {"max_position_embeddings": 1048576, "log_scaling_n_floor": 128000},
    "minimax_m2": {"rotary_dim": 64},
    "nemotron_h_8b": {"max_position_embeddings": 8192},
}


QUICK = ("kimi_linear_48b_a3b", "smollm3_3b", "nemotron_h_8b")


def configuration(name: str, **more: Any) -> Any:
    """What transformers makes of the settings of a preset."""
    _, architecture, settings = TOTALS[name]
    with_towers = architecture in ("Gemma3", "Gemma4", "Inkling")
    kind = f"{architecture}TextConfig" if with_towers else f"{architecture}Config"
    return getattr(transformers, kind)(**copy.deepcopy({**settings, **more}))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TOTALS]
)
def test_preset_has_the_published_total_and_is_what_the_configuration_describes(name: str) -> None:
    ours = compose(preset(name), device="meta")
    assert sum(p.numel() for p in ours.parameters()) == TOTALS[name][0] + COPIED.get(name, 0)
    values = json.loads(configuration(name, **BEYOND.get(name, {})).to_json_string(use_diff=False))
    described = compose(find(values).composition(values), device="meta")
    assert difference(ours, described) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", TOTALS)
def test_class_of_transformers_has_as_many(name: str) -> None:
    total, architecture, _ = TOTALS[name]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{architecture.removesuffix('Text')}ForCausalLM")(configuration(name))
    # LongCat's class has rows for experts without parameters, which it never reads.
    idle = getattr(theirs.config, "zero_expert_num", 0)
    unread = sum(idle * p[0].numel() for n, p in theirs.named_parameters() if idle and n.endswith("gate_up_proj"))
    # Biases of choice are buffers here, and parameters of some classes.
    found = sum(p.numel() for n, p in theirs.named_parameters() if "correction_bias" not in n)
    assert found - unread == total
