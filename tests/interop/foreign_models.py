"""The tiny models of these tests, as ``transformers`` describes them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

V, D, LAYERS = 97, 42, 4
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "max_position_embeddings": 128, **IDS}
SLOW = {"rope_type": "default", "rope_theta": 500.0}
ROPE = {"rope_parameters": SLOW}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 12}
EVEN = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}
DENSE = {"intermediate_size": 37}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FEW = {"num_local_experts": 5, "num_experts_per_tok": 2}
LINEAR = {"rope_type": "linear", "factor": 3.0}
WINDOW = {"sliding_window": 9}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
SHARP = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
MLA = {
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
}
MIXTURE = {
    "moe_intermediate_size": 13,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    **DENSE,
}
GROUPS = {"n_group": 4, "topk_group": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**HEADS, **DENSE, **ROPE}),
    "llama tied biased": ("Llama", {**HEADS, **DENSE, **ROPE, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": 6, "n_positions": 64, **IDS}),
    "mixtral": ("Mixtral", {**HEADS, "intermediate_size": 13, **ROPE, "num_local_experts": 5}),
    "llama llama3": ("Llama", {**HEADS, **DENSE, "rope_parameters": LLAMA3}),
    "llama linear": ("Llama", {**HEADS, **DENSE, "rope_parameters": {**ROPE["rope_parameters"], **LINEAR}}),
    "llama yarn": ("Llama", {**HEADS, **DENSE, "rope_parameters": YARN}),
    "llama yarn reversed": ("Llama", {**HEADS, **DENSE, "rope_parameters": {**YARN, "beta_slow": 1000.0}}),
    "mistral": ("Mistral", {**HEADS, **DENSE, **ROPE, "sliding_window": None}),
    "mistral windowed": ("Mistral", {**HEADS, **DENSE, **ROPE, "sliding_window": 9}),
    "mixtral windowed": ("Mixtral", {**HEADS, "intermediate_size": 13, **ROPE, "num_local_experts": 5, **WINDOW}),
    "qwen2": ("Qwen2", {**EVEN, **DENSE, **ROPE}),
    "qwen3": ("Qwen3", {**HEADS, **DENSE, **ROPE}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**HEADS, **DENSE, **ROPE, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 13}
        | {"norm_topk_prob": True},
    ),
    "olmo2": ("Olmo2", {**EVEN, **DENSE, **ROPE}),
    "olmoe": ("Olmoe", {**EVEN, "intermediate_size": 13, **ROPE, "num_experts": 5, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOss",
        {**HEADS, "intermediate_size": 13, "rope_parameters": {**YARN, "truncate": False}, **WINDOW}
        | {"num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "gemma2": ("Gemma2", {**HEADS, **DENSE, **ROPE, **WINDOW, "query_pre_attn_scalar": 48}),
    "gemma2 uncapped": (
        "Gemma2",
        {**HEADS, **DENSE, **ROPE, **WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "smollm3": ("SmolLM3", {**EVEN, **DENSE, **ROPE, "no_rope_layers": [1, 0, 1, 0]}),
    "gemma3_text": (
        "Gemma3Text",
        {**HEADS, **DENSE, **WINDOW, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2}
        | {"rope_parameters": {"sliding_attention": SLOW, "full_attention": {**SLOW, "rope_theta": 900.0, **LINEAR}}},
    ),
    "glm4_moe": ("Glm4Moe", {**HEADS, **MIXTURE, **ROPE, **GROUPS, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe air": (
        "Glm4Moe",
        {**HEADS, **MIXTURE, **ROPE, "partial_rotary_factor": 0.34, "routed_scaling_factor": 1.0},
    ),
    "minimax_m2": ("MiniMaxM2", {**HEADS, "intermediate_size": 13, **ROPE, **FEW, "rotary_dim": 6}),
    "apertus": ("Apertus", {**EVEN, **DENSE, "rope_parameters": LLAMA3}),
    "deepseek_v3": ("DeepseekV3", {**MLA, **MIXTURE, **ROPE, **GROUPS, "q_lora_rank": 13}),
    "deepseek_v3 one group": (  # the language model of DeepSeek-VL2, for which transformers has no class
        "DeepseekV3",
        {**MLA, **MIXTURE, **ROPE, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "routed_scaling_factor": 2.0},
    ),
    "deepseek_v3 plain yarn": (
        "DeepseekV3",
        {**MLA, **MIXTURE, "rope_parameters": YARN, **GROUPS, "q_lora_rank": 13},
    ),
    "deepseek_v3 yarn": ("DeepseekV3", {**MLA, **MIXTURE, "rope_parameters": SHARP, **GROUPS, "q_lora_rank": 13}),
}
for compressed in (False, True):
    for yarn in (False, True):
        words = "deepseek_v2" + " q_lora" * compressed + " yarn" * yarn
        positions = {"rope_parameters": SHARP} if yarn else ROPE
        gate = {"topk_method": "group_limited_greedy", **GROUPS} if compressed else {"topk_method": "greedy"}
        CASES[words] = (
            "DeepseekV2",
            {**MLA, **MIXTURE, **positions, **gate, "q_lora_rank": 13 if compressed else None},
        )


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of a case as transformers makes it, its weights not yet random."""
    architecture, settings = CASES[name]
    sizes = {} if architecture == "GPT2" else SIZES
    config = getattr(transformers, f"{architecture}Config")(
        **copy.deepcopy({**sizes, **settings})
    )  # it writes into them
    config._experts_implementation = "eager"  # the others refuse doubles
    heads = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    head = heads.get(architecture, f"{architecture}ForCausalLM")
    return getattr(transformers, head)(config).to(dtype).eval()
